"""`make gpu-check`: what it counts, which results it calls wrong, and when it fails. CI runs the command itself dry."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import torch_ops
from kernels.patterns import Pattern
from tests.bench import gpu_check, kernels
from tests.bench.gpu_check import DRY, LIMITS, REAL, Goal, Limits, Section, Setting
from tests.bench.kernels import OURS

CPU = torch.device("cpu")
PATTERNS = [Pattern("dense"), Pattern("banded", 7), Pattern("strided", 5), Pattern("fixed", 6, 2)]
SHAPES = DRY.shapes._replace(head_dims=(64,), vocab=300)


def setting(tmp_path: Path, run: gpu_check.Run = DRY) -> Setting:
    return Setting(run._replace(shapes=SHAPES), CPU, "a device", Limits(1.0, 1.0), tmp_path)


def use(monkeypatch: pytest.MonkeyPatch, build: Any, **ops: Any) -> None:
    """Reduce the table to one case that `build` makes. Put kernels.torch_ops and `ops` in place of Triton's ops."""
    broken = SimpleNamespace(**{**vars(torch_ops), **ops})
    monkeypatch.setattr(gpu_check, "choose", lambda device, choice: broken)
    table = kernels.cases
    monkeypatch.setattr(kernels, "cases", lambda *args: [case for case in table(*args) if case.func.__name__ == build][:1])


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.kind)
@pytest.mark.parametrize("length", [1, 6, 30])
def test_work_is_that_of_the_keys_that_are_seen(pattern: Pattern, length: int) -> None:
    pairs = [(q, k) for q in range(length) for k in range(length) if pattern.sees(q, k)]
    # D multiplications and additions for the score, and as many for the weighted value.
    assert kernels.attention_flops(pattern, length, 64) == sum(2 * 64 + 2 * 64 for _ in pairs)
    rows = [key for query, key in pairs if query == length - 1] * 2 + ["q", "out"]
    assert kernels.decode_bytes(pattern, length, 128) == 128 * len(rows)


def test_the_real_shapes_are_those_of_the_goals() -> None:
    shapes = REAL.shapes
    assert shapes.prompts * shapes.width // max(shapes.head_dims) >= 64
    banded = Pattern("banded", shapes.band)
    row_bytes = shapes.width * shapes.dtype.itemsize
    for pattern in (Pattern("dense"), banded):
        assert shapes.batch * kernels.decode_bytes(pattern, shapes.context, row_bytes) >= 256 << 20
    attentions = [case for case in kernels.cases(shapes, torch_ops, CPU) if case.func.__name__ == "attention"]
    goals = gpu_check.goals(shapes, "A100")
    assert len(goals) == 6
    assert goals.keys() <= {kernels.attention_name(*case.args[:3]) for case in attentions}


def test_every_weight_is_read_in_a_decode_step_but_the_positions() -> None:
    config = gpu_check.TINY
    width = config.n_embd
    block = 4 * width * width + 4 * width + 2 * width * config.n_inner + config.n_inner + width + 4 * width
    assert gpu_check.weights_read(config) == config.padded_vocab_size * width + config.n_layer * block + 2 * width
    assert gpu_check.weights_read(REAL.models["gpt3-1.3b"]) >= gpu_check.ROOFLINE_PARAMETERS


def test_errors_are_relative_to_their_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert kernels.relative_error(expected, expected) == 0
    assert kernels.relative_error(expected + torch.tensor([[0.0, 0.5], [0.0, 0.0]]), expected) == pytest.approx(0.1)
    assert kernels.relative_error((expected, expected), (expected, 2 * expected)) == pytest.approx(0.5)
    assert kernels.relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert kernels.relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("wrong", [float("nan"), 1.001])
def test_a_wrong_kernel_gets_no_time_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: float) -> None:
    def broken(*args: Any) -> Tensor:
        return torch_ops.decode_attention(*args) * wrong

    use(monkeypatch, "attention", decode_attention=broken)
    text, failures = gpu_check.time_kernels(setting(tmp_path))
    error = "nan" if wrong != wrong else "0.001"
    reason = f"wrong: relative error {error}, allowed 1e-05"
    assert failures == [f"decode_attention dense, D 64, {OURS}: {reason}"]
    rows = [line for line in text.splitlines() if line.startswith("| decode_attention dense")]
    assert rows[0] == f"| decode_attention dense, D 64 | {OURS} | - | - | - | - | - | - | {reason} |"
    assert all(row.endswith("| dry run: not a measurement |") for row in rows[1:])
    assert len(rows) == 3


def test_a_kernel_that_raises_fails_and_a_rival_that_raises_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raises(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel | at all\nand more")

    use(monkeypatch, "bias_activation", bias_activation=raises)
    assert gpu_check.time_kernels(setting(tmp_path)).failures == [
        f"bias_activation gelu_new, 5 x 512, {OURS}: no kernel | at all"
    ]
    monkeypatch.undo()
    use(monkeypatch, "attention")
    monkeypatch.setattr(kernels, "flex_attention", raises)
    text, failures = gpu_check.time_kernels(setting(tmp_path))
    assert failures == []
    assert "| FlexAttention, not compiled | - | - | - | - | - | - | no kernel / at all |" in text


def test_a_case_that_cannot_be_built_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, "sampling")
    monkeypatch.setattr(torch_ops, "sample", lambda *args: 1 / 0)
    text, failures = gpu_check.time_kernels(setting(tmp_path))
    assert failures == ["sampling ('greedy', 0.0, 0, 1.0, 0.0, False): division by zero"]
    assert text.startswith("## Kernels")


def test_goals_stand_beside_the_figures(tmp_path: Path) -> None:
    task = kernels.Task(kernels.attention_name("decode_attention", Pattern("dense"), 64), 8 * 10**8, "TB/s", 0.0)
    row = kernels.Row(task, OURS, 0.001, (0.9, 1.0, 1.1))
    real = setting(tmp_path, REAL)
    assert gpu_check.kernel_line(row, real)[-4:] == ["0.8 TB/s", "80 %", "0.001", "floor met (70 -> 85 %)"]
    assert gpu_check.kernel_line(row._replace(way="SDPA"), real)[-1] == ""
    assert gpu_check.kernel_line(row, setting(tmp_path))[-1] == "dry run: not a measurement"
    assert gpu_check.kernel_line(row, real._replace(name="NVIDIA H200"))[-3] == f"{100 * 0.8 / 4.8:.3g} %"
    goal = Goal(70, 85, "%")
    assert [goal.verdict(x).split(" (")[0] for x in (69.9, 70, 85)] == ["missed", "floor met", "target met"]
    assert {limits.chip for limits in LIMITS.values()} == {chip for chip, _ in gpu_check.PREFILL_GOALS}


def test_speedups_compare_ours_with_ours() -> None:
    def row(pattern: Pattern, ms: float, way: str = OURS) -> kernels.Row:
        task = kernels.Task(kernels.attention_name("decode_attention", pattern, 64), 1, "TB/s", 0.0)
        return kernels.Row(task, way, 0.0, (ms, ms, ms))

    dense, banded = Pattern("dense"), Pattern("banded", REAL.shapes.band)
    rows = [row(dense, 9.0), row(dense, 1.0, "SDPA"), row(banded, 2.0)]
    assert gpu_check.speedups(rows, REAL).splitlines()[2:] == ["| decode_attention, D 64 | 4.50 x | target met (4 -> 4 x) |"]


@pytest.mark.parametrize(
    ("body", "counts", "failures"),
    [
        ("def test_good(): pass", "1 passed, 0 failed, 0 skipped", []),
        ("def test_bad(): assert 0", "0 passed, 1 failed, 0 skipped", ["test case::test_bad"]),
        ("import nothing_such", "0 passed, 1 failed, 0 skipped", ["test ::case"]),
        ("", "0 passed, 0 failed, 0 skipped", ["pytest ended with status 5: 0 passed, 0 failed, 0 skipped"]),
        (
            "import pytest\n@pytest.mark.skip\ndef test_skipped(): pass",
            "0 passed, 0 failed, 1 skipped",
            ["pytest ended with status 0: 0 passed, 0 failed, 1 skipped"],
        ),
    ],
)
def test_failed_and_missing_tests_are_failures(
    tmp_path: Path, body: str, counts: str, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins take most of such a run
    (tmp_path / "case.py").write_text(body)
    arguments = ("-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path / "case.py"))
    text, found = gpu_check.run_tests(setting(tmp_path, DRY._replace(tests=arguments)))
    assert f": {counts} (dry run: not a measurement)" in text
    assert found == failures


def fake_sections(monkeypatch: pytest.MonkeyPatch, failures: list[str]) -> None:
    monkeypatch.setattr(gpu_check, "run_tests", lambda setting: Section("## Tests", failures))
    monkeypatch.setattr(gpu_check, "time_kernels", lambda setting: Section("## Kernels", []))
    monkeypatch.setattr(gpu_check, "serve", lambda model, setting: Section(f"## {model}", []))


def test_the_report_is_written_and_the_exit_status_says_whether_something_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for failures, status in ([], 0), (["test x"], 1):
        fake_sections(monkeypatch, failures)
        assert gpu_check.check(DRY, CPU, tmp_path / "results") == status
        (report,) = (tmp_path / "results").iterdir()
        assert report.name.startswith("gpu-check-cpu-")
        assert capsys.readouterr().out == report.read_text() + "\n"
    assert "## Failed\n\n- test x\n\n## Tests\n\n## Kernels\n\n## tiny\n" in report.read_text()


def test_a_section_that_raises_is_a_failure_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sections(monkeypatch, [])

    def raises(setting: Setting) -> Section:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr(gpu_check, "time_kernels", raises)
    assert gpu_check.check(DRY, CPU, tmp_path) == 1
    report = capsys.readouterr().out
    assert "- Kernels: CUDA error: an illegal memory access\n" in report
    assert "## tiny\n" in report


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "no CUDA device; `make gpu-check DRY=1` runs the same command at toy size on a CPU\n"
    assert captured.out == ""
