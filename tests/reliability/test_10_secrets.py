"""Promise 10, secrets: credentials and queries of URLs are never stored or printed."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from callbacks.record_writer import RecordWriter
from safervlm import addresses
from safervlm.addresses import public_text
from safervlm.cli.main import main
from safervlm.vlm.llava import Llava
from safervlm.vlm.server import client

TOKEN = "s3cr3t-t0ken"
KEY = "sk-proj-7Hq/0vN2+xLr95tWd"


@pytest.fixture
def private_table(tiny_sets: Path) -> Iterator[str]:
    """The address of a table that is sent only to those who know the token."""
    image = base64.b64encode((tiny_sets / "unsafe" / "images" / "0.png").read_bytes()).decode()
    content = f"index\timage\tlabel\n0\t{image}\tunsafe\n1\t0\tsafe\n".encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == f"/set.tsv?token={TOKEN}" else 403, f"you said {self.path}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set.tsv"
    server.shutdown()


def test_token_in_a_source_url_is_neither_stored_nor_printed(
    private_table: str,
    measuring_line: Callable[[Path, Path], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def line(run: str, source: str) -> list[str]:
        measuring = measuring_line(tmp_path / run, tmp_path)
        kept = [word for word in measuring if not word.startswith("--data.")]
        data = ["--data=safervlm.data.benchmark.Benchmark", "--data.name=Private", f"--data.cache_dir={tmp_path}/cache"]
        return [*kept, *data, f"--data.source={source}"]

    main(line("run", f"{private_table}?token={TOKEN}"))
    main(line("run", f"{private_table}?token={TOKEN}"))  # resumes
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["measure"]["settings"]
    assert settings["data"]["source"].startswith(f"{private_table}#query-")
    main(["verify", str(tmp_path / "run"), "--addresses", f"[{settings['data']['source']}]"])
    main(["evaluation", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    for source in (f"{private_table}?token={TOKEN}&more", private_table.replace("//", f"//me:{TOKEN}@")):
        with pytest.raises(SystemExit) as end:
            main(line("failed", source))
        assert end.value.code == 2
    said = capfd.readouterr()
    assert "can't be fetched" in said.err
    assert TOKEN not in said.out + said.err
    for file in tmp_path.rglob("*"):
        assert TOKEN not in file.name
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("data.source", ["--data.source=s3://me:{}@bucket/x.tsv"]),
        ("data.source", ["--data.source=https://me:{}@bucket/x.tsv"]),
        ("data.cache_dir", ["--data.source=x.tsv", "--data.cache_dir=https://host/{}?{}"]),
    ],
)
def test_url_given_as_a_path_is_rejected_without_showing_its_secrets(
    argument: str,
    line: list[str],
    measuring_line: Callable[[Path, Path], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    measuring = [word for word in measuring_line(tmp_path / "run", tmp_path) if not word.startswith("--data.")]
    given = [word.format(*[TOKEN if "@" in word else "x", TOKEN]) for word in line]
    with pytest.raises(SystemExit) as end:
        main([*measuring, "--data=safervlm.data.benchmark.Benchmark", "--data.name=Private", *given])
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert f"error: {argument}: " in said
    assert "name the copy" in said
    assert TOKEN not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["record", "run"])
def test_a_key_in_an_exception_is_neither_shown_nor_stored(
    where: str,
    measuring_line: Callable[[Path, Path], list[str]],
    tiny_sets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def raises(*args: object) -> None:
        raise RuntimeError(f"illegal header 'Bearer {KEY}' to https://me:{TOKEN}@host/v1?key={quote(KEY, safe='')}")

    place = {"record": (Llava, "generate"), "run": (RecordWriter, "on_predict_batch_end")}[where]
    monkeypatch.setattr(*place, raises)
    with pytest.raises(SystemExit) as ended:
        main([*measuring_line(tmp_path / "run", tiny_sets / "unsafe"), "--model.failures_in_a_row=1000"])
    assert ended.value.code == {"record": 3, "run": 1}[where]
    named = {"record": "responses-failed.jsonl", "run": "traceback.txt"}[where]
    assert "illegal header" in (tmp_path / "run" / named).read_text()
    texts = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for text in (*texts, *capfd.readouterr()):
        assert KEY not in text
        assert quote(KEY, safe="") not in text
        assert TOKEN not in text


def test_value_of_a_custom_key_variable_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SECRET_VARIABLES", variables := set())
    monkeypatch.setattr(addresses, "SECRET_VARIABLES", variables)
    monkeypatch.setenv("MY_OWN_KEY", f" {KEY} ")
    assert KEY in public_text(f"as {KEY}.")
    client.Server("m", addresses=["http://127.0.0.1:9/v1"], api_key_variable="MY_OWN_KEY").load()
    assert public_text(f"as {KEY}.") == "as (key)."
    monkeypatch.setenv("MY_OWN_KEY", "EMPTY")  # a word
    assert public_text("EMPTY") == "EMPTY"
