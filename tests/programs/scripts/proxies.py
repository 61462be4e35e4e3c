"""What a proxy in front of the server must not spoil."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from checks import KEEP_ALIVE, MODEL, PATIENCE, PROMPT, TOO_LONG, check, metric, wait_for

# As many connections as proxies usually keep, and where the second request on each lies around the mark.
KEPT = 16
SPACING = 0.02
HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-none"}


def post(url, body, path="/v1/completions"):
    """The connection and the answer, whose body is still to be read."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
    connection.request("POST", parts.path + path, json.dumps(body), HEADERS)
    return connection, connection.getresponse()


def answer(url, body):
    connection, response = post(url, body)
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


def completion(model, **fields):
    return {"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0} | fields


def check_proxy(url, model=MODEL, chat=None):
    """Checks the proxy at `url`, which has the server's model under a name, and perhaps another one for chats."""

    @check("a completion")
    def _():
        status, text = answer(url, completion(model))
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == 32, text

    @check("a chat")
    def _():
        body = {"model": chat or model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        connection, response = post(url, body, "/v1/chat/completions")
        text = response.read().decode()
        connection.close()
        assert response.status == 200, text
        assert json.loads(text)["choices"][0]["message"]["role"] == "assistant", text

    @check("a stream, event by event")
    def _():
        started = time.monotonic()
        connection, response = post(url, completion(model, stream=True, max_tokens=100, temperature=1, seed=1))
        came = []
        while line := response.readline():
            if line.startswith(b"data: {"):
                came.append(time.monotonic() - started)
        connection.close()
        assert response.status == 200, response.status
        assert len(came) > 30, f"{len(came)} events"
        assert came[0] < came[-1] / 3, f"the first event came after {came[0]:.2f} s, the last after {came[-1]:.2f} s"

    @check("an error keeps its status, code and message")
    def _():
        status, text = answer(url, completion(model, prompt=TOO_LONG))
        assert status == 400, (status, text[:300])
        error = json.loads(text)["error"]
        assert "2048" in error["message"], error

    @check("a client that leaves frees its slot")
    def _():
        before = metric("banded_requests_total", 'outcome="abort"')
        connection, response = post(url, completion(model, stream=True, max_tokens=1900, ignore_eos=True, temperature=1))
        for _ in range(5):
            response.readline()
        response.close()
        connection.close()
        wait_for(lambda: metric("banded_requests_total", 'outcome="abort"') > before, "the request is aborted", 5)

    for mark in sorted({5.0, KEEP_ALIVE}):

        @check(f"connections idle for {mark:g} s lose no request")
        def _(mark=mark):
            lost = around_the_mark(url, model, mark)
            assert not lost, f"{len(lost)} of {KEPT} requests were lost, the first with {lost[0]}"


def around_the_mark(url, model, mark):
    """Sends requests over as many connections, and on each another `mark` seconds later, give or take."""
    body = completion(model, max_tokens=24, ignore_eos=True, temperature=1)

    def again(place):
        time.sleep(mark + (place - KEPT / 2) * SPACING)
        try:
            status, text = answer(url, body)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None if status == 200 else f"{status}: {text[:200]}"

    with ThreadPoolExecutor(KEPT) as pool:
        assert [status for status, _ in pool.map(lambda _: answer(url, body), range(KEPT))] == [200] * KEPT
        return [problem for problem in pool.map(again, range(KEPT)) if problem]
