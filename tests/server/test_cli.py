# SPDX-License-Identifier: Apache-2.0
"""Flags made from the dataclasses; generate and chat as pipes; failures in one sentence."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rocm_infer import cli
from rocm_infer.config import EngineConfig, ServerConfig
from rocm_infer.server import lifecycle

GREEDY = ["--temperature", "0", "--max-tokens", "6", "--ignore-eos"]


def served_with(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[EngineConfig, ServerConfig]:
    """The configurations that `serve` makes of its flags."""
    seen: list[Any] = []

    def run_server(engine: EngineConfig, server: ServerConfig, **_: Any) -> int:
        seen.extend((engine, server))
        return 0

    monkeypatch.setattr(lifecycle, "run_server", run_server)
    assert cli.main(["serve", *argv]) == 0
    return seen[0], seen[1]


def test_no_flags_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served_with(monkeypatch) == (EngineConfig(), ServerConfig())


@pytest.mark.parametrize("spelling", [["--model-path", "m"], ["--model", "m"], ["m"]])
def test_spellings_of_the_model(monkeypatch: pytest.MonkeyPatch, spelling: list[str]) -> None:
    assert served_with(monkeypatch, *spelling)[0].model == "m"


def test_the_familiar_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--model-path m --tp 2 --trust-remote-code --host 0.0.0.0 --port 1234 --mem-fraction-static 0.8 "
        "--chunked-prefill-size 512 --max-running-requests 7 --disable-radix-cache --context-length 99 --random-seed 3 "
        "--served-model-name a b --served-model-name c --api-key k --log-level error --skip-server-warmup --dtype float16"
    )
    engine, server = served_with(monkeypatch, *flags.split())
    assert engine == EngineConfig(
        model="m",
        tensor_parallel_size=2,
        trust_remote_code=True,
        mem_fraction_static=0.8,
        chunked_prefill_size=512,
        max_running_requests=7,
        disable_radix_cache=True,
        context_length=99,
        random_seed=3,
        dtype="float16",
    )
    assert server == ServerConfig(
        host="0.0.0.0",
        port=1234,
        served_model_name=("a", "b", "c"),
        api_key=("k",),
        log_level="error",
        skip_server_warmup=True,
    )
    assert "never run" in capsys.readouterr().err


def test_every_field_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    for config in (EngineConfig, ServerConfig):
        for item in dataclasses.fields(config):
            assert "--" + item.name.replace("_", "-") in shown
            assert all(name in shown for name in item.metadata["names"])


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["serve", "--port", "99999"], 2, "port: expected 0 to 65535"),
        (["serve", "--page-size", "0"], 2, "page_size: expected a positive number"),
        (["generate", "--temperature", "3", "x"], 2, "temperature"),
        (["generate", "--model", "./absent", "x"], 1, "no such directory"),
        (["generate", "--model", "not a hub id", "x"], 1, "no such directory"),
        (["serve", "--chat-template", "absent.jinja"], 1, "absent.jinja: no such file"),
        (["generate", "--input", "absent.txt"], 1, "absent.txt"),
    ],
)
def test_failures_are_one_sentence(
    argv: list[str], code: int, says: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv[0] == "serve":
        argv = [*argv, "--model", str(checkpoint)]
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_generate_from_arguments(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", str(checkpoint), *GREEDY, "the cat", "abc", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the cat", "abc"]
    assert all((len(line["token_ids"]), line["finish_reason"]) == (6, "length") for line in lines)


def test_generate_from_stdin_and_jsonl(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [
        "the cat",
        {"prompt": "abc"},
        {"text": "x"},
        {"prompt": [1, 2]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in prompts) + "\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    out = tmp_path / "out.jsonl"
    assert cli.main(["generate", "--model", str(checkpoint), *GREEDY, "--output", str(out)]) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["prompt"] for result in results[:3]] == ["the cat", "abc", "x"]
    assert results[4]["prompt"].startswith("<|bos|><|user|>hi")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": '))
    assert cli.main(["generate", "--model", str(checkpoint)]) == 1
    assert "line 1" in capsys.readouterr().err


def test_chat_as_a_pipe(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n/reset\nhi\n/quit\nmore\n"))
    assert cli.main(["chat", "--model", str(checkpoint), *GREEDY, "--system", "be brief"]) == 0
    said = capsys.readouterr().out
    assert said == 2 * said[: len(said) // 2]
    assert len(said) > 2


def test_explain_tells_what_serves_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "tiny-deepseek", "--arch", "gfx942", "--kernel-backend", "triton", "--tp", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny-deepseek on gfx942, tensor parallel 2")
    lines = [line.split() for line in out.splitlines()[1:] if line]
    assert ["mla_decode", "triton", "asked", "for"] in lines
    assert cli.main(["explain"]) == 0
    assert "rms_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--arch", "gfx803"], "arch: expected one of gfx90a"),
        (["--arch", "gfx942", "--tp", "16"], "tensor_parallel_size: 16 do not divide the attention heads 8"),
    ],
)
def test_compile_refuses_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["compile", *flags]) in (1, 2)
    assert told in capsys.readouterr().err
