"""Promise 10, secrets: what an address holds besides a place stands in no file and in no message."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from safervlm.cli.main import main

TOKEN = "s3cr3t-t0ken"


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


def test_a_token_in_an_address_is_stored_nowhere(
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
def test_an_address_in_the_place_of_a_path_is_rejected_without_its_secrets(
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
