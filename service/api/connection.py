"""A client's connection: uvicorn's fast HTTP protocol, corrected where clients rely on what it does not do."""

from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Headers by which a client offers to speak another protocol; Connection names them.
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


class Connection(HttpToolsProtocol):
    """Answers an offer to upgrade in HTTP/1.1 (RFC 9110, 7.8), and sends an HTTP/1.0 client no chunks."""

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _should_upgrade(self) -> bool:
        """True makes the callbacks set a request aside whose headers ask for an upgrade. The parser stops after them."""
        return True

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read the headers again without the offer, and then `rest`: the body, which a stopped parser would drop."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is not supported.")
            return
        lines = [method + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name == b"connection":
                options = [option for option in value.split(b",") if option.strip().lower() not in UPGRADE_HEADERS]
                value = b",".join(options)
            if name not in UPGRADE_HEADERS:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, until_closed(app, cycle) if cycle.scope["http_version"] == "1.0" else app)


def until_closed(app: ASGIApp, cycle: RequestResponseCycle) -> Any:
    """`app`, whose responses without a content-length end with the connection: HTTP/1.0 has no chunks."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        is_open = False

        async def unchunked(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = not any(name.lower() == b"content-length" for name, _ in message["headers"])
                if is_open:
                    cycle.chunked_encoding = False
            elif is_open:
                cycle.expected_content_length = len(message["body"])  # uvicorn checks every part against it
            await send(message)

        await app(scope, receive, unchunked)

    return respond
