"""The HTTP connection to a server: bounded bodies, no redirects, and no proxy for this machine.

Needs the extra ``api`` (httpx2 comes with openai), so it is imported where the first request is sent.
"""

import zlib
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

CHANGED = (b"content-encoding", b"content-length", b"transfer-encoding")  # headers that no longer describe the body


class BodyError(Exception):
    """A body can't be read."""


class BodyTooLargeError(BodyError):
    """A body is larger than the limit."""


class Bounded(httpx2.AsyncBaseTransport):
    """Reads each body whole, up to a limit that holds before and after decompression.

    httpx decompresses a chunk without a limit, so that a few kilobytes become gigabytes. No compression is asked for;
    gzip and deflate are read nevertheless, as some proxies compress whatever they pass on.

    Args:
        inner: sends the requests.
        max_body: bytes of a body.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport, max_body: int) -> None:
        self.inner, self.max_body = inner, max_body

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends a request and reads the response.

        Raises:
            BodyError: the body can't be decoded, or is too large.
        """
        request.headers["Accept-Encoding"] = "identity"
        response = await self.inner.handle_async_request(request)
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
            headers=[(name, value) for name, value in response.headers.raw if name.lower() not in CHANGED],
            content=decompressed(bytes(body), response.headers.get("content-encoding", ""), self.max_body),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self.inner.aclose()


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """A body without its Content-Encoding.

    Args:
        body: as it was sent.
        encoding: the header's value; empty where there is none.
        limit: bytes that may come of it.

    Raises:
        BodyError: another encoding than gzip or deflate, a damaged body, or one that exceeds the limit.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity") or not body:
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BodyError(f"the body has the Content-Encoding {encoding[:40]!r}, which was not asked for")
    content, rest = bytearray(), body
    while rest:  # gzip allows several members
        # 47: the header says whether it is gzip or zlib; -15: deflate without a header, which some servers send.
        plain = encoding == "deflate" and rest[0] & 0x0F != 8
        stream = zlib.decompressobj(-15 if plain else 47)
        try:
            content += stream.decompress(rest, limit + 1 - len(content))
        except zlib.error as error:
            raise BodyError(f"the body is no {encoding} ({error})") from None
        if len(content) > limit:
            raise BodyTooLargeError(f"more than {limit} bytes, decompressed")
        if not stream.eof:
            raise BodyError(f"the {encoding} body ends in the middle")
        rest = stream.unused_data
    return bytes(content)


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_for(address: str) -> str | None:
    """The proxy that the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) names for an address.

    None for this machine's own addresses, whatever the environment says: a question to them must not leave it.
    """
    url = urlsplit(address)
    host = url.hostname or ""
    if is_this_machine(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def client_for(address: str, max_body: int, concurrency: int) -> httpx2.AsyncClient:
    """What sends requests to a server. It follows no redirect: questions and images go to the named address alone.

    Args:
        address: the base URL.
        max_body: bytes of a response's body.
        concurrency: connections to keep.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
    inner = httpx2.AsyncHTTPTransport(proxy=proxy_for(address), limits=limits)
    return httpx2.AsyncClient(transport=Bounded(inner, max_body), follow_redirects=False, trust_env=False)
