"""curl, with each version of HTTP that it offers a server without TLS."""

import json
import subprocess

from checks import LINE_SEPARATORS, MODEL, PROMPT, URL, check, tell

BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}


def curl(*arguments, path="/v1/completions", body=None):
    """What curl printed, the answer's head included."""
    command = ["curl", "--silent", "--show-error", "--include", "--no-buffer", "--max-time", "60", *arguments, URL + path]
    if body is not None:
        command += ["--data-binary", "@-", "--header", "content-type: application/json"]
    done = subprocess.run(command, input=json.dumps(body).encode() if body else b"", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def texts(events):
    lines = [line[6:] for line in events.split("\n") if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


tell(version=subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1])

for version in ("--http1.0", "--http1.1", "--http2"):

    @check(f"{version}: a completion, and the same as a stream")
    def _(version=version):
        head, _, body = curl(version, body=BODY).partition("\r\n\r\n")
        assert " 200 " in head.splitlines()[0], (head, body)
        text = json.loads(body)["choices"][0]["text"]
        head, _, events = curl(version, "--raw", body=BODY | {"stream": True}).partition("\r\n\r\n")
        assert " 200 " in head.splitlines()[0], (head, events)
        if version == "--http1.0":
            assert "transfer-encoding" not in head.lower(), f"a client of HTTP/1.0 can't read this: {head}"
        assert events.rstrip("\r\n0").endswith("data: [DONE]"), events[-200:]
        assert texts(events) == text

    @check(f"{version}: an error")
    def _(version=version):
        head, _, body = curl(version, body=BODY | {"max_tokens": -1}).partition("\r\n\r\n")
        assert " 400 " in head.splitlines()[0], head
        assert json.loads(body)["error"]["param"] == "max_tokens"


@check("--head: /health and /v1/models")
def _():
    for path in ("/health", "/v1/models"):
        head = curl("--head", path=path)
        assert " 200 " in head.splitlines()[0], f"{path}: {head.splitlines()[0]}"


@check("a body that waits for 100 Continue")
def _():
    answer = curl("--header", "expect: 100-continue", body=BODY)
    assert "100 Continue" in answer, answer
    assert '"text_completion"' in answer


@check("a body in chunks")
def _():
    assert '"text_completion"' in curl("--header", "transfer-encoding: chunked", body=BODY)


@check("separators of lines")
def _():
    body = BODY | {"prompt": LINE_SEPARATORS, "echo": True, "stream": True}
    assert texts(curl(body=body)).startswith(LINE_SEPARATORS)
