"""A client's connection: uvicorn's fast HTTP protocol, with bounds on what a client may send before it is answered.

Requests on a connection are parsed one at a time: what follows a request waits unparsed until its answer is written. So a
client that sends ahead costs one bounded buffer, and one that leaves is noticed.
"""

from asyncio import BufferedProtocol
from functools import partial
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.api.errors import APIError
from service.api.gate import Gate, Wait

MAX_LINE = 16 << 10  # bytes of the request line
MAX_FIELD = 16 << 10  # bytes of a header's name and value
MAX_FIELDS = 100
MAX_HEAD = 64 << 10  # bytes of the request line and all headers
# Bytes that a chunked body may spend on lengths, extensions and trailers beyond as many as its content has.
MAX_FRAMING = 64 << 10
# Bytes after a request that are read ahead of its answer. The gate sees whether a client leaves whose bytes are not read.
MAX_AHEAD = 8 << 10
MAX_DISCARDED = 32 << 20  # bytes of a body that are read, and thrown away, after its answer
MAX_LINGER = 1 << 20  # bytes that are read, and thrown away, after a request that was refused
MAX_UNSENT = 16 << 10  # bytes of answers that wait for the client to read before the application waits too
# Bytes that are read at a time, unless they are the body of a request whose turn has come: a crowd that sends large bodies
# at once costs little before that.
READ = 16 << 10
# A turn of the event loop parses this many bytes of a chunked body. Each piece that it is cut into counts as so many more.
TURN, PIECE = 64 << 10, 256
# Bytes of a head that are parsed at once. The others wait for each other, so that short ones pass them.
SHORT_HEAD = 4096
END = b"\r\n\r\n"  # of headers and of chunked bodies: the parser accepts no other
# Headers that tell how and when the body comes.
FRAMING = frozenset((b"content-length", b"transfer-encoding", b"expect"))
# Headers by which a client offers to speak another protocol; Connection names them.
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


class Flow(FlowControl):
    """Reads nothing while `is_held`, even if an application waits for more of its request."""

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """Answers an offer to upgrade in HTTP/1.1 (RFC 9110, 7.8), sends an HTTP/1.0 client no chunks, and keeps the bounds."""

    flow: Flow

    def __init__(self, gate: Gate, **options: Any):
        super().__init__(**options)
        self._gate = gate
        self.wait: str | None = None
        self.held = 0
        self._data, self._at = b"", 0  # what came, and how much of it is parsed
        self._is_whole = True  # the request has come completely; before the first one too
        self._is_over = False  # nothing is parsed or answered any more
        self._is_ahead = False  # the request came ahead of the last answer
        self._unsent = 0  # bytes of the last answer, when the client was last waited for in vain
        self._begin()

    def _begin(self) -> None:
        """Expect a request."""
        self._has_begun = False  # its first byte has come
        self._in_body = False
        self._has_started = False  # the application knows of it
        self._num_fields = 0
        self._length: int | None = 0  # that the body will have; None: it is chunked
        self._head = 0  # bytes of the unfinished head
        self._has_line = False
        self._tail = b""  # the last bytes parsed, which may begin an END
        self._framed = self._content = 0  # bytes of the body, with and without framing
        self._noted = 0  # bytes of the content when they were last waited for
        self._discarded = 0
        self._rests = False  # reads no more of a body that nobody wants, until its turn
        self._fault: APIError | None = None

    # Called by the transport

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow = Flow(transport)
        transport.set_write_buffer_limits(MAX_UNSENT)
        if not self._gate.enter(self):
            error = APIError(503, "the server has too many connections", code="unavailable", headers={"retry-after": "1"})
            self._refuse(error, lingers=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._data, self._at = b"", 0
        self._gate.leave(self)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio allows it
        """The client has left: nobody shuts only one half of a connection to an HTTP server. It is closed in its turn."""
        self._is_over = True
        self._data, self._at = b"", 0  # nobody waits for the answers to what was sent ahead
        self._gate.hold(self, 0)
        self._gate.listen(self)
        self._abandon()
        self._gate.wait(self, Wait.CLOSING)
        self._gate.close(self, self.transport.close)
        return True

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the transport writes what it reads next, see Reader."""
        if self._is_whole or not self._has_started:
            return self._gate.buffer[:READ]
        return self._gate.buffer[:TURN] if self._length is None else self._gate.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._gate.buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            self._discarded += len(data)
            if self._discarded > MAX_LINGER:
                self.transport.pause_reading()
            return
        has_waited = bool(self._data)
        self._data, self._at = (self._data[self._at :] + data, 0) if has_waited else (data, 0)
        advance = partial(self._advance, has_waited=has_waited)
        ahead = len(self._data) - self._at
        is_head = self._is_whole or not self._in_body
        if is_head and ahead > SHORT_HEAD and self._data.find(END, self._at, self._at + SHORT_HEAD) < 0:
            self._gate.parse(self, advance)
            self._settle()
        else:
            advance()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._settle()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._advance()

    # Called by the gate

    def overdue(self, wait: str) -> None:
        if wait in (Wait.IDLE, Wait.LINGER):
            self._close()
        elif wait is Wait.CLOSING:
            unsent = self.transport.get_write_buffer_size()
            if unsent == self._unsent:
                self.transport.abort()
            else:
                self._unsent = unsent
                self._gate.wait(self, wait)
        elif wait is Wait.BODY and (self.flow.read_paused or self.cycle.waiting_for_100_continue):
            self._gate.wait(self, wait)  # it is the application that does not read on
        else:
            what = "body" if wait is Wait.BODY else "request"
            self._refuse(APIError(408, f"the {what} did not come in time", code="request_timeout"), lingers=False)

    def give_way(self) -> None:
        self._is_over = True
        self._abandon()
        self.transport.abort()
        # Now, because many may give way before the first of them is closed.
        self._data, self._at = b"", 0
        self.parser = self.headers = self.scope = None  # type: ignore[assignment]

    def has_left(self) -> None:
        self.eof_received()

    def descriptor(self) -> int:
        number: int = self.transport.get_extra_info("socket").fileno()
        return number

    # Parsing

    def _advance(self, *, has_waited: bool = True) -> None:
        """Parse what has come up to the end of the request, for one turn. The rest waits for the answer, or for its turn.

        `has_waited` tells that the first of it has waited for that, and has not come just now.
        """
        if self._is_over:
            return
        work = 0
        while self._at < len(self._data) and not self._is_over:
            if self._is_whole:
                if self.flow.write_paused or (self.cycle and not self.cycle.response_complete):
                    break  # the answer to the last request is unwritten
                self._begin()
                self._is_whole, self._is_ahead = False, has_waited
            if work >= TURN:
                self.loop.call_soon(self._advance)
                break
            at, end = self._at, self._cut()
            self._at = end
            work += PIECE + (end - at if self._length is None else 0)
            self._feed(self._data if end - at == len(self._data) else self._data[at:end])
        if self._is_over or self._at == len(self._data):
            self._data, self._at = b"", 0
        self._settle()

    def _cut(self) -> int:
        """The place in the data to which it may be parsed without running into the next request."""
        data, at = self._data, self._at
        if self._in_body and self._length is not None:
            return min(len(data), at + self._length - self._content)
        most = at + (TURN if self._in_body else MAX_HEAD - self._head)
        if self._tail and (found := (self._tail + data[at : at + 3]).find(END)) >= 0:
            return min(at + found + len(END) - len(self._tail), most)
        found = data.find(END, at, most)
        return min(len(data), most) if found < 0 else found + len(END)

    def _feed(self, piece: bytes) -> None:
        """Parse a piece that reaches into no other request, and check the bounds that only the unparsed bytes show."""
        was_in_body = self._in_body
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._ignore_upgrade()
            return
        except httptools.HttpParserError:
            self._refuse(self._fault or APIError(400, "the request is not valid HTTP", code="invalid_http"))
            return
        if self._is_whole:
            return
        if not self._in_body:
            self._tail = (self._tail + piece)[-3:]
            self._head += len(piece)
            self._has_line = self._has_line or (self._has_begun and b"\n" in piece)
            if self._head > MAX_LINE and not self._has_line:
                self._refuse(too_long_a_line())
            elif self._head >= MAX_HEAD:
                self._refuse(APIError(431, f"the headers are longer than {MAX_HEAD} bytes", code="headers_too_large"))
        elif was_in_body:
            if self._length is None:
                self._tail = (self._tail + piece)[-3:]
                self._framed += len(piece)
                if self._framed > 2 * self._content + MAX_FRAMING:
                    message = "the body's chunks have more lengths, extensions and trailers than content"
                    self._refuse(APIError(431, message, code="headers_too_large"))
            if self.cycle.response_complete:
                self._discarded += len(piece)
                if self._discarded > MAX_DISCARDED:
                    self._gate.count("sent on after its answer")
                    self._linger()
                elif len(piece) >= READ:
                    self._rests = True
                    self._gate.discard(self, self._read_on)
        else:
            self._tail = b""

    def _settle(self) -> None:
        """Read on if there is room, and tell the gate what the connection waits for."""
        if self._data or self.held or not self._is_whole or self._waits_for_turn:
            self._make_room()
        if self._is_over or self.transport.is_closing():
            return
        has_more = False  # of a body that is waited for
        if self.flow.write_paused:
            wait: str | None = Wait.UNREAD
        elif self._is_whole:
            is_idle = not self._data and (not self.cycle or self.cycle.response_complete)
            wait = Wait.IDLE if is_idle else None
        elif self._in_body:
            wait = Wait.BODY
            has_more = self._content > self._noted and not self.cycle.response_complete
            self._noted = self._content
        else:
            wait = Wait.HEAD if self._has_begun else self.wait  # blank lines ahead of a request begin none
        if wait is not self.wait or has_more:
            self._gate.wait(self, wait)

    def _read_on(self) -> None:
        self._rests = False
        self._settle()

    @property
    def _waits_for_turn(self) -> bool:
        """Whether the body of a request has begun that the application does not know of yet."""
        return self._in_body and not self._has_started and not self._is_over

    def _make_room(self) -> None:
        """Keep within bounds what waits unparsed, or for its request's turn."""
        ahead = len(self._data) - self._at
        if (ahead > MAX_AHEAD or self._rests or (self._waits_for_turn and not self._is_whole)) != self.flow.is_held:
            self.flow.is_held = not self.flow.is_held
            if self.flow.is_held:
                self.flow.pause_reading()
                self._gate.ignore(self)
            else:
                self.flow.resume_reading()
                self._gate.listen(self)
        held = ahead + (0 if self._is_whole or self._in_body else self._head)
        if self._waits_for_turn:
            held += len(self.cycle.body)
        if held != self.held:
            self._gate.hold(self, held)

    # Called by the parser. What they raise ends the parsing.

    def on_message_begin(self) -> None:
        if self._has_begun:  # the parser saw an end where _cut saw none: whose bytes these are is unclear
            raise ValueError
        self._has_begun = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > MAX_LINE - len("GET  HTTP/1.1"):
            self._fault = too_long_a_line()
            raise self._fault

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_fields += 1
        if self._num_fields > MAX_FIELDS or len(name) + len(value) > MAX_FIELD:
            bounds = f"{MAX_FIELDS} of at most {MAX_FIELD} bytes may come"
            self._fault = APIError(431, f"a header is too long, or there are too many: {bounds}", code="headers_too_large")
            raise self._fault
        if self._in_body:
            return  # a trailer is no header of a request that may have been answered
        name = name.lower()
        if name in FRAMING:
            if name == b"content-length":
                self._length = int(value)
            elif name == b"transfer-encoding":
                self._length = None
            else:
                self.expect_100_continue |= value.lower() == b"100-continue"
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._content += len(body)
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._is_whole = True
        super().on_message_complete()

    # Answering

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._is_over = True
            self._gate.wait(self, Wait.CLOSING)
            return
        self.cycle.body.clear()  # nobody asked for it
        self.flow.resume_reading()
        if self._data:
            self.loop.call_soon(self._advance)
        elif self._is_whole:
            self.cycle = self.scope = self.headers = None  # type: ignore[assignment]  # an idle connection is small
        self._settle()

    def _refuse(self, error: APIError, *, lingers: bool = True) -> None:
        """Answer the request with `error`, unless its answer has begun, and close the connection."""
        self._gate.count(str(error.status))
        if not (self._in_body and self.cycle.response_started):
            headers = [*self.server_state.default_headers, *error.response.raw_headers, (b"connection", b"close")]
            lines = b"".join(b"%s: %s\r\n" % header for header in headers)
            self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(error.response.body))
        self._abandon()
        if lingers:
            self._linger()
        else:
            self._close()

    def _linger(self) -> None:
        """Parse no more, and close when the client has had time to read: to close while more comes resets the connection."""
        self._is_over, self._discarded = True, 0
        self.transport.write_eof()
        self.flow.resume_reading()
        self._gate.wait(self, Wait.LINGER)

    def _abandon(self) -> None:
        """Tell the application that its client has gone, if it knows of the request."""
        self._gate.forget(self)
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_writing()

    def _close(self) -> None:
        self._is_over = True
        self.transport.close()
        self._gate.wait(self, Wait.CLOSING)

    def _should_upgrade(self) -> bool:
        """True makes the callbacks set a request aside whose headers ask for an upgrade. The parser stops after them."""
        return True

    def _ignore_upgrade(self) -> None:
        """Read the headers again without the offer."""
        method = self.parser.get_method()
        self._begin()
        if method == b"CONNECT":
            self._refuse(APIError(400, "CONNECT is not supported", code="invalid_http"))
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
        self._is_whole = False
        self._feed(b"\r\n".join([*lines, b"", b""]))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Have the request answered in its turn."""
        start = super()._start_asgi_task

        def begin() -> None:
            self._has_started = True
            if self.held or self.flow.is_held:
                self._make_room()
            if not cycle.disconnected:
                start(cycle, until_closed(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

        path = cycle.scope["path"]
        if self._gate.is_probe(path):
            cycle.access_log = False  # a line takes a third of the time, and anybody may ask
        has_more = self._at < len(self._data)
        self._gate.start(self, path, begin, is_ahead=self._is_ahead, has_more=has_more)


class Reader(BufferedProtocol):
    """What the transport sees of a connection: uvloop asks no asyncio.Protocol, as uvicorn's is, for a buffer."""

    CALLBACKS = tuple(name for name in dir(BufferedProtocol) if not name.startswith("_"))

    def __init__(self, connection: Connection):
        for name in self.CALLBACKS:
            setattr(self, name, getattr(connection, name))


def too_long_a_line() -> APIError:
    return APIError(414, f"the request line is longer than {MAX_LINE} bytes", code="line_too_long")


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
