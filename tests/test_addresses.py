"""Addresses are shown and recorded without their secrets."""

import pytest

from safervlm.addresses import has_user, is_address, public, public_text

SECRET = "s3cr3t-t0ken"
PLAIN = [
    "https://host.example/a/b.tsv",
    "http://localhost:8000/v1",
    "http://[::1]:8000/v1",
    "https://host/@scope/x.csv",
    "data/set.tsv",
    "/home/me/a.tsv",
    "owner/name@revision",
    "me@host: hello",
    "x: /a/b?c",
    "C:/data/a.tsv",
    "",
]
SECRETS = {
    f"https://me:{SECRET}@host/x.tsv": "https://host/x.tsv",
    f"https://{SECRET}@host:8443/x.tsv": "https://host:8443/x.tsv",
    f"https://me@x:{SECRET}@host/x.tsv": "https://host/x.tsv",
    f"https://me:{SECRET}/1@host/x.tsv": "https://...",
    f"https://me:{SECRET}?1@host/x.tsv": "https://...",
    f"https://me:{SECRET}#1@host/x.tsv": "https://...",
    f"s3://key:{SECRET}@bucket/x.tsv": "s3://bucket/x.tsv",
    f"https:/me:{SECRET}@host/x.tsv": "https:/host/x.tsv",  # as pathlib writes it
    f"HTTPS://host/x.tsv?token={SECRET}": "HTTPS://host/x.tsv#query-",
    f"https://host/x.tsv?a=1&sig={SECRET}#part": "https://host/x.tsv#query-",
    f"https://host?{SECRET}": "https://host#query-",
    f"https://host/x.tsv#{SECRET}": "https://host/x.tsv#query-",
    f"https://me:{SECRET}@host/x.tsv?token={SECRET}": "https://host/x.tsv#query-",
}


@pytest.mark.parametrize("text", PLAIN)
def test_texts_without_secrets_are_unchanged(text: str) -> None:
    assert public(text) == public_text(text) == text
    assert not has_user(text)


@pytest.mark.parametrize("address", SECRETS)
def test_secrets_are_removed(address: str) -> None:
    shown = public(address)
    assert shown.startswith(SECRETS[address])
    assert public(shown) == shown
    assert has_user(address) == ("@" in address)
    for text in (
        "{}",
        "the source '{}' is missing: look",
        "[{}, 3]",
        '{{"source": "{}"}}',
        "--data.source={} --x ({}).",
    ):
        assert SECRET not in public_text(text.format(address, address)), text
        assert public_text(public_text(text.format(address, address))) == public_text(text.format(address, address))


def test_addresses_with_different_queries_stay_different() -> None:
    first, second, third = (public(f"https://host/x.tsv{query}") for query in ("?id=1", "?id=2", ""))
    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    ("text", "expected"), [("https://x", True), (" s3://x", True), ("a/b", False), ("C:/x", False)]
)
def test_urls_are_distinguished_from_paths(text: str, expected: bool) -> None:
    assert is_address(text) == expected
