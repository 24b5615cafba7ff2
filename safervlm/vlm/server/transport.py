"""HTTP transport to a server: bounded bodies, no redirects, and no proxy for this machine.

Needs the extra ``api`` (httpx2 comes with openai), so it is imported only before the first request.
"""

import zlib
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

# Request headers that are sent. The openai package adds others from environment variables (OPENAI_ORG_ID,
# OPENAI_PROJECT_ID, OPENAI_CUSTOM_HEADERS), which the user has not set for these addresses.
SENT = ("host", "accept", "connection", "content-type", "content-length", "user-agent")
MEMBERS = 100  # maximum parts of a gzip body; for each, all that follow it are copied, so that many take minutes
CHANGED = (b"content-encoding", b"content-length", b"transfer-encoding")  # headers that no longer describe the body


class BodyError(Exception):
    """Raised when a body can't be decoded."""


class BodyTooLargeError(BodyError):
    """Raised when a body exceeds the size limit."""


class Bounded(httpx2.AsyncBaseTransport):
    """HTTP transport that sends only the headers that are needed, and limits the size of a body, also decompressed.

    httpx decompresses a chunk without a limit, so a few kilobytes may become gigabytes. No compression is requested,
    but gzip and deflate are accepted, because some proxies compress every response.

    Args:
        inner: Transport that sends the requests.
        max_body: Maximum size of a body, in bytes.
        key: API key to send.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport, max_body: int, key: str) -> None:
        self.inner, self.max_body, self.key = inner, max_body, key

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends a request and reads the response.

        Args:
            request: The request; only some of its headers are sent.

        Raises:
            BodyError: The body can't be decoded, or is too large.
        """
        kept = {name: request.headers[name] for name in SENT if name in request.headers}
        kept |= {"accept-encoding": "identity", "authorization": f"Bearer {self.key}"}
        # A new request: the openai package reads the headers of its own one again.
        sent = httpx2.Request(
            request.method, request.url, headers=kept, stream=request.stream, extensions=request.extensions
        )
        response = await self.inner.handle_async_request(sent)
        try:
            body = bytearray()
            async for chunk in response.stream:  # type: ignore[union-attr]
                body += chunk
                if len(body) > self.max_body:
                    raise BodyTooLargeError(f"more than {self.max_body} bytes")
        finally:
            await response.aclose()
        return httpx2.Response(
            response.status_code,
            headers=[header for header in response.headers.raw if header[0].lower() not in dropped_headers(response)],
            content=decompressed(bytes(body), response.headers.get("content-encoding", ""), self.max_body),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.inner.aclose()


def dropped_headers(response: httpx2.Response) -> set[bytes]:
    """Returns the names of the headers that no longer describe the body, or name an unknown encoding.

    Args:
        response: Response with its headers.
    """
    try:
        b"a".decode(response.charset_encoding or "utf-8", "replace")
    except (LookupError, UnicodeError, ValueError, AssertionError):
        return {*CHANGED, b"content-type"}
    return set(CHANGED)


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """Removes the Content-Encoding of a body.

    Args:
        body: Body as it was sent.
        encoding: Value of the Content-Encoding header; empty if there is none.
        limit: Maximum size after decompression, in bytes.

    Raises:
        BodyError: The encoding is neither gzip nor deflate, the body is damaged, or it exceeds the limit.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity") or not body:
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BodyError(f"the body has the Content-Encoding {encoding[:40]!r}, which was not asked for")
    content, rest = bytearray(), body
    for _ in range(MEMBERS):  # gzip allows several
        # 47: detects gzip or zlib by the header; -15: deflate without a header, which some servers send.
        plain = encoding == "deflate" and rest[0] & 0x0F != 8
        stream = zlib.decompressobj(-15 if plain else 47)
        try:
            content += stream.decompress(rest, limit + 1 - len(content))
        except zlib.error as error:
            raise BodyError(f"the body is not valid {encoding} ({error})") from None
        if len(content) > limit:
            raise BodyTooLargeError(f"more than {limit} bytes, decompressed")
        if not stream.eof:
            raise BodyError(f"the {encoding} body ends in the middle")
        rest = stream.unused_data
        if not rest:
            return bytes(content)
    raise BodyError(f"the {encoding} body has more than {MEMBERS} parts")


def is_this_machine(host: str) -> bool:
    """Returns whether a host name or address refers to this machine.

    Args:
        host: Host name or IP address.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(address: str) -> str | None:
    """Returns the proxy that the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) names for an address.

    It is None for addresses of this machine, regardless of the environment: requests to them must not leave it.

    Args:
        address: Base URL of the server.
    """
    url = urlsplit(address)
    host = url.hostname or ""
    if is_this_machine(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def client_for(address: str, key: str, max_body: int, concurrency: int) -> httpx2.AsyncClient:
    """Returns an HTTP client that follows no redirects, so that questions and images go only to the named address.

    Args:
        address: Base URL of the server.
        key: API key to send.
        max_body: Maximum size of a response body, in bytes.
        concurrency: Number of connections to keep alive.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
    inner = httpx2.AsyncHTTPTransport(proxy=proxy_for(address), limits=limits)
    return httpx2.AsyncClient(transport=Bounded(inner, max_body, key), follow_redirects=False, trust_env=False)
