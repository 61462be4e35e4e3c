"""`make bench`: verdicts, ceilings, whose turn it is, and a toy run of every scenario."""

import csv
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.engine.loading import load_checkpoint
from service.tools.bench import BenchError, Program, Result, Stream, Workload
from tests.bench import inside, report, run
from tests.bench.peers import Peers, Servers, Side
from tests.bench.report import Line, Sample, Target
from tests.bench.run import QUICK, REAL, SCENARIOS, Bench, Skip
from tests.demand import needs_vnni
from tests.model.checkpoint.checkpoints import tiny

NOBODY = Peers(None, None, None, Path("/nowhere"))

# A completions server that answers "a", "b", "c". It stands in for llama-server and for Banded.
PARROT = f"""#!{sys.executable}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

WORDS = [dict(choices=[dict(text=word)]) for word in "abc"]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(json.dumps(dict(data=[dict(id="parrot")])))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        usage = dict(choices=[], usage=dict(completion_tokens=asked["max_tokens"]))
        lines = [json.dumps(event) for event in (*WORDS, usage)] + ["[DONE]"]
        self.answer("".join("data: " + line + "\\n\\n" for line in lines))

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

if "--version" in sys.argv:
    print("version: 1")
else:
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take peers and settings out of the environment. Afterwards, restore what the benchmark changed."""
    for name in [name for name in os.environ if name.startswith(("BANDED_", "BENCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def parrot(tmp_path: Path) -> Path:
    program = tmp_path / "llama-server"
    program.write_text(PARROT)
    program.chmod(0o755)
    return program


def side(name: str, *command: object) -> Side:
    return Side(name, "bf16", Program(tuple(map(str, command)), "/health"))


def test_verdicts_are_about_what_is_printed() -> None:
    faster, sooner = Target(1.7, 1.73), Target(0.7, 0.5)
    assert [faster.verdict(x) for x in (1.69, 1.7, 1.7249, 1.7251, 2)] == ["MISSED", "met", "met", "aim met", "aim met"]
    assert [sooner.verdict(x) for x in (0.71, 0.7, 0.51, 0.5, 0.1)] == ["MISSED", "met", "met", "aim met", "aim met"]
    assert faster.verdict(math.nan) == "not measured"


def test_a_line_says_what_it_compares() -> None:
    line = Line("peaked-1", "tokens/s", 123.4, "llama.cpp bf16", 100.0, Target(1.0, 1.2), ceiling=200.0)
    assert line.cells() == ["peaked-1", "tokens/s", "123", "llama.cpp bf16 100", "1.23x", "1x", "1.2x", "aim met", "62%"]
    alone = line._replace(against="", theirs=math.nan, ceiling=math.nan)
    assert alone.cells()[3:] == ["-", "-", "1x", "1.2x", "not measured", "-"]
    absolute = Line("start", "s", 3.52, target=Target(10, 3, "s"))
    assert absolute.cells()[2:] == ["3.52", "-", "-", "10 s", "3 s", "met", "-"]


def test_the_best_of_the_others_stands_beside_ours() -> None:
    medians = {"Banded": 5.0, "slow": 2.0, "fast": 4.0}
    assert run.compare("s", "f", medians)[3:5] == ("fast", 4.0)
    assert run.compare("s", "f", medians, best=min)[3:5] == ("slow", 2.0)
    assert math.isnan(run.compare("s", "f", {"Banded": 5.0}).theirs)


def test_the_ceiling_counts_prompts_and_steps() -> None:
    # 8 prompts of 128 tokens, 512 tokens in 0.256 s; then 100 steps of 20 ms, with 128 to 228 keys of each, 10 us a key.
    found = run.ceiling({"8": 0.02, "prompt": 0.256}, Workload(8, 16, 128, 100), chunk=512, reading=1e-5)
    assert found == pytest.approx(800 / (8 * 0.064 + 100 * (0.02 + 8 * 178 * 1e-5)))


def test_the_ceiling_is_made_of_all_products_of_a_step(tmp_path: Path) -> None:
    directory = tiny("banded", tmp_path, vocab_size=50257)
    checkpoint = load_checkpoint(inside.options(str(directory), "float32"))
    calls = inside.products(checkpoint, 5, 2)
    assert len(calls) == 4 * checkpoint.model.config.n_layer + 1  # c_attn, c_proj, c_fc, c_proj of each layer, and the head
    assert [len(call.args[0]) for call in calls] == [5] * (len(calls) - 1) + [2]


def test_full_slots_decode_at_any_context(tmp_path: Path) -> None:
    runner = inside.full_runner(QUICK.model, 3)
    assert len(runner.launch(inside.decode(3, QUICK.model.n_positions)).result().tokens) == 3


def test_only_streams_that_decode_together_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(streams: list[Stream]) -> None:
        monkeypatch.setattr(run, "keep", lambda *args: None)
        monkeypatch.setattr(run, "run_async", lambda _: Result(load, 9.0, streams))

    load = Workload(2, 2, 64, 4)
    keep([Stream(0.0, [1.0, 2.0, 3.0, 4.0], 63), Stream(0.0, [2.5, 3.0, 3.5, 5.5], 63)])
    # From 2.5 to 4, one stream has events at 3 and 4, the other at 3 and 3.5.
    assert run.decode_phase("url", "model", load, "seed") == pytest.approx(4 / 1.5)
    for cached, late in ((0, 2.5), (63, 4.5)):
        keep([Stream(0.0, [1.0, 4.0], 63), Stream(0.0, [late, 5.0], cached)])
        with pytest.raises(BenchError, match="did not decode together"):
            run.decode_phase("url", "model", load, "seed")


def state(server: Program, servers: Servers) -> str:
    """Linux's letter for the state of a process. T means stopped."""
    pid = servers.kept[server][0].process.pid
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_gaps_count_while_all_streams_decode() -> None:
    early, late = Stream(0.0, [1.0, 2.0, 5.0, 6.0, 8.0], 0), Stream(0.0, [3.0, 5.5, 9.0], 0)
    assert run.gaps_together(Result(Workload(2, 2), 9.0, [early, late])) == [1.0, 2.0, 2.5]
    with pytest.raises(BenchError, match="did not decode together"):
        run.gaps_together(Result(Workload(2, 2), 9.0, [Stream(0.0, [1.0, 2.0], 0), late]))


def test_one_server_runs_at_a_time(parrot: Path) -> None:
    first, second = Program((str(parrot), "first"), "/health"), Program((str(parrot), "second"), "/health")
    with Servers() as servers:
        for _ in range(2):
            with servers.only(first) as (url, model):
                assert model == "parrot"
                assert state(first, servers) != "T"
            with servers.only(second) as (other, _):
                assert other != url
                assert (state(first, servers), state(second, servers)) != ("T", "T")
                assert state(first, servers) == "T"
        processes = [server.process for server, _ in servers.kept.values()]
        assert len(processes) == 2
    assert all(process.returncode is not None for process in processes)


def test_sides_take_turns_and_a_peer_that_fails_is_left_out(parrot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = side("broken", sys.executable, "-c", "raise SystemExit('no model')")
    sides = [side("Banded", parrot, 1), broken, side("other", parrot, 2)]
    asked: list[tuple[str, str]] = []
    with Servers() as servers:
        bench = Bench(QUICK, 2, NOBODY, servers)
        found = bench.in_turn("s", sides, lambda url, model, seed: asked.append((url, seed)))
        assert [side.name for side in found] == ["Banded", "other"]
        with pytest.raises(BenchError, match="no model"):
            bench.in_turn("s", [broken._replace(name="Banded")], lambda *_: None)
    urls, seeds = zip(*asked, strict=True)
    assert seeds == ("s 0", "s 0", "s 1", "s 1")
    assert urls[:2] == urls[2:]
    assert "s: broken is left out: the server ended with status 1 before it was ready: no model" in capsys.readouterr().out


CONVERT = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv))"


def test_a_checkpoint_is_converted_once(parrot: Path, tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERT)
    peers = Peers(parrot, tmp_path, None, tmp_path)
    (found,) = peers.llama(tmp_path / "gpt2", "q8_0", 4, 100)
    target = tmp_path / "gpt2-q8_0.gguf"
    assert f"{tmp_path / 'gpt2'} --outfile" in target.read_text()
    command = found.program.command
    assert [command[command.index(name) + 1] for name in ("-m", "-np", "-c")] == [str(target), "4", "400"]
    target.write_text("kept")
    assert peers.gguf(tmp_path / "gpt2", "q8_0") == target
    assert target.read_text() == "kept"
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise SystemExit('no such architecture')")
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf\.py failed: no such architecture"):
        peers.gguf(tmp_path / "gpt2", "bf16")
    with pytest.raises(ValueError, match=r"gpt2-bf16\.gguf has to be made: say where convert_hf_to_gguf\.py is"):
        peers._replace(llama_convert=None).gguf(tmp_path / "gpt2", "bf16")


def test_who_is_measured_beside_whom(parrot: Path, tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERT)
    bench = Bench(QUICK, 1, Peers(parrot, tmp_path, Path(sys.executable), tmp_path), Servers())
    load = Workload(3, 3, prompt=100, output=100)
    names = (run.LLAMA_Q8, *run.BF16_PEERS)
    sides = run.rivals(bench, bench.gpt2, names, load)
    assert tuple(side.name for side in sides) == names
    assert [side.name for side in run.rivals(bench, bench.peaked, (run.LLAMA_BF16,), load)] == [run.LLAMA_BF16]
    for side in sides[:2]:
        assert side.program.command[-4:] == ("-np", "3", "-c", "768")
    assert sides[2].program.command[-6:] == ("--model", str(bench.gpt2), "--dtype", "bfloat16", "--max-model-len", "256")
    alone = Bench(QUICK, 1, NOBODY._replace(work=tmp_path), Servers())
    assert run.rivals(alone, alone.gpt2, names, load) == []


def test_a_dtype_that_is_not_served_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(QUICK, 1, NOBODY, Servers())
    with pytest.raises(Skip, match="`banded serve` has no --dtype int4"):
        bench.ours(Path("model"), "int4")

    def skip(bench: Bench, name: str) -> list[Line]:
        raise Skip("no such thing")

    def fail(bench: Bench, name: str) -> list[Line]:
        raise BenchError("no server")

    monkeypatch.setitem(SCENARIOS, "peaked-1", skip)
    assert run.measure_all(bench, ["peaked-1"]) == ([], False)
    monkeypatch.setitem(SCENARIOS, "peaked-1", fail)
    lines, failed = run.measure_all(bench, ["peaked-1", "kv-memory"])
    assert failed
    assert [line.scenario for line in lines] == ["kv-memory"]
    out = capsys.readouterr().out
    assert "peaked-1: skipped: no such thing\n" in out
    assert "peaked-1: failed: no server\n" in out


def test_the_alternating_model_admits_173_sequences_for_100_dense_ones() -> None:
    (line,) = run.kv_memory(Bench(REAL, 1, NOBODY, Servers()), "kv-memory")
    assert line.cells()[2:] == ["1729", "all dense 1000", "1.73x", "1.7x", "1.73x", "aim met", "-"]


def test_curves_are_medians_of_the_rounds() -> None:
    curve = report.Curve("peaked", "tokens/s", "", "", "")
    samples = [
        Sample(scenario, turn, who, "bf16", figure, value, at)
        for scenario, who, figure, at, values in (
            ("peaked-8", "Banded", "tokens/s", 8, (3, 1, 2)),
            ("peaked-1", "Banded", "tokens/s", 1, (7, 7, 9)),
            ("peaked-1", "other", "tokens/s", 1, (1, 1, 1)),
            ("peaked-1", "Banded", "TTFT ms", 1, (5, 5, 5)),
            ("http", "Banded", "tokens/s", 32, (6, 6, 6)),
        )
        for turn, value in enumerate(values)
    ]
    assert report.series(curve, samples) == {"Banded": {1: 7, 8: 2}, "other": {1: 1}}


TOY_RUNS = [
    # Those of one run share its servers and the times of products.
    ("flat-8", "flat-32", "flat-top-p-8", "flat-top-p-32", "greedy-loop", "long-prompts", "gaps", "prefix", "ttft", "http"),
    ("peaked-1", "peaked-8", "peaked-32", "top-p-1", "top-p-8", "top-p-32", "chain-8", "chain-32"),
    ("cost-top-p-8", "cost-top-p-32", "cost-logprobs", "cost-penalties", "cost-busy"),
    ("int8-1", "int8-16", "limits", "kv-memory", "profile"),
    ("alternating", "context"),
    ("start",),
]


@pytest.mark.parametrize(
    "names",
    [pytest.param(names, marks=[needs_vnni] if names[0] == "int8-1" else []) for names in TOY_RUNS],
    ids=lambda names: names[0],
)
def test_a_toy_run(names: tuple[str, ...], parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERT)
    results = tmp_path / "results"
    options = ["--quick", "--rounds", "1", "--results", str(results), "--llama-server", str(parrot)]
    assert run.main([*options, "--llama-convert", str(tmp_path), "--only", *names]) == 0
    out = capsys.readouterr().out
    assert "llama.cpp version: 1" in out
    assert "vLLM is not measured" in out
    samples = set(results.glob("*-samples.csv"))
    (table,) = {*results.glob("*.csv")} - samples
    kept: list[dict[str, Any]] = [row for file in samples for row in csv.DictReader(file.read_text().splitlines())]
    assert len(list(results.glob("*.png"))) == bool({"flat-8", "peaked-1", "context"} & {*names})
    rows: list[dict[str, Any]] = list(csv.DictReader(table.read_text().splitlines()))
    skipped = {name for name in names if f"{name}: skipped" in out}
    assert {row["scenario"] for row in rows} == {*names} - skipped
    assert all(row["cpu"] and row["torch"] for row in rows)
    assert all(float(row["ours"]) > 0 for row in rows if not row["figure"].startswith("%"))
    assert all(0 <= float(row["ours"]) <= 100 for row in rows if row["figure"].startswith("%"))
    if "peaked-8" in names:
        assert {row["side"] for row in kept if row["scenario"] == "peaked-8"} == {"Banded bfloat16", "llama.cpp bf16"}
        assert {row["sampling"] for row in kept if row["scenario"] == "top-p-8"} == {"top_p 0.95"}
        assert all(float(row["ttft_p99"]) >= float(row["ttft_p50"]) > 0 for row in kept if row["streams"])


def test_every_scenario_has_a_toy_run() -> None:
    assert {name for names in TOY_RUNS for name in names} == {*SCENARIOS}


def test_each_scenario_keeps_its_last_run(tmp_path: Path) -> None:
    stem = tmp_path / "machine"
    facts = {"date": "then", "revision": "a", "cpu": "x", "cores": "2", "torch": "2"}

    def lines(*names: str, ours: float) -> list[report.Line]:
        return [report.Line(name, "tokens/s", ours) for name in names]

    def samples(*names: str, value: float) -> list[Sample]:
        return [Sample(name, 0, "Banded", "bf16", "tokens/s", value, at) for name in names for at in (1, 8)]

    report.write(stem, facts, lines("peaked-1", "peaked-8", ours=1), samples("peaked-1", "peaked-8", value=1.00004))
    paths = report.write(stem, facts | {"date": "now", "vLLM": "1"}, lines("peaked-1", ours=2), samples("peaked-1", value=2))
    assert paths == [stem.with_suffix(".csv"), tmp_path / "machine-samples.csv", stem.with_suffix(".png")]
    found = [(row["scenario"], row["ours"], row["date"], row["vLLM"]) for row in report.read_rows(paths[0])]
    assert found == [("peaked-8", "1", "then", ""), ("peaked-1", "2", "now", "1")]
    raw = [(row["scenario"], row["value"], row["streams"], row["ttft_p50"]) for row in report.read_rows(paths[1])]
    assert raw == [("peaked-8", "1.0", "", "")] * 2 + [("peaked-1", "2", "", "")] * 2
    assert [report.sample_of(row) for row in report.read_rows(paths[1])][:2] == samples("peaked-8", value=1.0)


def test_a_machine_is_named_after_its_cores_and_what_they_lack() -> None:
    facts = {"cpu": "Intel(R) Xeon(R) Processor @ 2.0GHz", "cores": "2", "instructions": "AVX512"}
    assert report.machine_name(facts) == "intel-xeon-processor-2-0ghz-2-cores"
    assert report.machine_name({"cpu": "AMD EPYC", "cores": "2", "instructions": "AVX2"}) == "amd-epyc-2-cores-avx2"


def test_the_environment_is_written_down() -> None:
    facts = report.environment({"vLLM": "1"})
    assert list(facts) == ["date", "revision", "machine", "cpu", "cores", "instructions", "python", "torch", "vLLM"]
    assert json.dumps(facts)
    assert int(facts["cores"]) >= 1
