# SPDX-License-Identifier: Apache-2.0
"""`rocm-infer serve | generate | chat | compile | explain | replay | conform`. Flags are made from the fields of the configuration dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rocm_infer import __version__
from rocm_infer.config import ConfigError, EngineConfig, SamplingParams, ServerConfig

if typing.TYPE_CHECKING:
    from rocm_infer.llm import LLM

SAMPLING_HELP = {
    "max_tokens": "longest output",
    "min_tokens": "tokens before an end is allowed",
    "temperature": "0: always the likeliest token",
    "top_p": "smallest set of tokens with this probability",
    "top_k": "only this many likeliest tokens, 0: all",
    "min_p": "only tokens this likely beside the likeliest",
    "presence_penalty": "against tokens already used, -2 to 2",
    "frequency_penalty": "against tokens used often, -2 to 2",
    "repetition_penalty": "against tokens of prompt and output, 1: none",
    "seed": "the same seed gives the same output",
    "n": "outputs for each prompt",
    "stop": "text that ends the output",
    "ignore_eos": "go on to max_tokens",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 success, 1 failure told in one sentence, 2 wrong usage."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    run, command = args.pop("run"), args.pop("command")
    try:
        code: int = run(args)
        return code
    except ConfigError as error:
        print(f"rocm-infer {command}: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(f"rocm-infer {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rocm-infer", description="LLM inference for AMD GPUs, and for any machine.")
    parser.add_argument("--version", action="version", version=f"rocm-infer {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="serve | generate | chat | compile | explain | replay | conform"
    )

    serve = commands.add_parser("serve", help="an OpenAI-compatible server", description="Serve a model over HTTP.")
    serve.add_argument("model_name", nargs="?", metavar="MODEL", help="same as --model")
    _add_fields(serve, ServerConfig)
    _add_fields(serve, EngineConfig)
    serve.set_defaults(run=_serve)

    generate = commands.add_parser(
        "generate",
        help="complete prompts from arguments, a file or stdin",
        description="Complete prompts: the arguments, else the lines of --input or stdin. A line that is a JSON object is read "
        'as {"prompt": ...}, {"text": ...} or {"messages": [...]}.',
    )
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    generate.add_argument("--input", metavar="FILE", help="prompts, one a line, text or JSONL; - is stdin")
    generate.add_argument("--output", metavar="FILE", help="write JSONL there instead of text to stdout")
    generate.add_argument("--json", action="store_true", help="write JSONL to stdout")
    generate.add_argument("--chat", action="store_true", help="each prompt is a user message for the chat template")
    _add_fields(generate, SamplingParams, only=SAMPLING_HELP)
    _add_fields(generate, EngineConfig)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser(
        "chat",
        help="a conversation in the terminal",
        description="Talk to a model. /reset starts over, /quit or Ctrl-D ends. Reads one message a line where stdin is a pipe.",
    )
    chat.add_argument("--system", metavar="TEXT", help="system message")
    _add_fields(chat, SamplingParams, only=SAMPLING_HELP)
    _add_fields(chat, EngineConfig)
    chat.set_defaults(run=_chat)

    compiler = commands.add_parser(
        "compile",
        help="compile a model's GPU kernels ahead, on any machine",
        description="Compile the Triton kernels that serving a model with these settings will launch, for GPUs that need not be "
        "here. Reads only config.json of the checkpoint.",
    )
    compiler.add_argument("--arch", required=True, metavar="GFX[,GFX]", help="architectures, such as gfx942,gfx950")
    compiler.add_argument("--output", metavar="DIR", help="bundle for `serve --kernel-bundle`, default: Triton's cache here")
    compiler.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile (default 1)")
    _add_fields(compiler, EngineConfig)
    compiler.set_defaults(run=_compile)

    explain = commands.add_parser(
        "explain",
        help="which kernel serves which op, and why",
        description="Without --model or --arch: the order in which calls here try kernels. With them: what serves the ops of a "
        "model's steps on an architecture, and the reason.",
    )
    explain.add_argument("--markdown", action="store_true", help="the support table of README.md")
    explain.add_argument("--arch", metavar="GFX[,GFX]", help="architectures, default: the GPU here, else all")
    _add_fields(explain, EngineConfig)
    explain.set_defaults(run=_explain_kernels)

    replay = commands.add_parser(
        "replay",
        help="repeat the last steps of an engine that crashed",
        description="Run the steps in a capsule again, with its model and settings, and compare the tokens. The server writes "
        "capsules when its engine dies; --capsule-token-ids makes them complete.",
    )
    replay.add_argument("capsule", metavar="CAPSULE", help="the file; the server's log names it")
    replay.set_defaults(run=_replay)

    conform = commands.add_parser(
        "conform",
        help="check that a server keeps the HTTP contract",
        description="Run the checks of the HTTP contract against any OpenAI-compatible server. Exit code 1 if one fails.",
    )
    conform.add_argument("--base-url", required=True, metavar="URL", help="the server, such as http://127.0.0.1:30000")
    conform.add_argument("--model", metavar="NAME", help="the model to ask, default: the first of /v1/models")
    conform.add_argument("--api-key", metavar="KEY", help="bearer token")
    conform.add_argument("--only", default="*", metavar="PATTERN", help="checks to run, such as chat, stream.stop*, *.usage*")
    conform.add_argument("--json", dest="json_path", type=Path, metavar="FILE", help="write the results there as well")
    conform.set_defaults(run=_conform)
    return parser


def _add_fields(parser: argparse.ArgumentParser, config: type, only: dict[str, str] | None = None) -> None:
    """One flag per field of a dataclass. Flags that are not given leave no trace, so that the dataclass's defaults hold."""
    group = parser.add_argument_group(config.__name__)
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        if only is not None and item.name not in only:
            continue
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata.get("help") or (only or {}).get(item.name, "")
        shown = "" if item.default in (None, (), False) else f" (default {item.default})"
        group.add_argument(
            *dict.fromkeys((flag, *item.metadata.get("names", ()))),
            dest=item.name,
            default=argparse.SUPPRESS,
            help=(text + shown).replace("%", "%%"),
            **_flag_kind(hints[item.name], item.metadata.get("choices") or None),
        )


def _flag_kind(hint: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """argparse keywords for a field's type: bool a switch, tuple a list that may be repeated, else one value."""
    if hint is bool:
        return {"action": "store_true"}
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return {"action": "extend", "nargs": "+", "metavar": "TEXT"}
    if choices:
        return {"choices": choices}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _take(args: dict[str, Any], config: type) -> dict[str, Any]:
    """The given flags that are fields of a dataclass."""
    names = {item.name for item in dataclasses.fields(config)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in args.items() if name in names}


def _serve(args: dict[str, Any]) -> int:
    from rocm_infer.logs import set_up_logging
    from rocm_infer.server.lifecycle import run_server

    positional = args.pop("model_name")
    if positional is not None:
        args.setdefault("model", positional)
    engine, server = EngineConfig(**_take(args, EngineConfig)), ServerConfig(**_take(args, ServerConfig))
    set_up_logging(server.log_level, server.log_format)
    _explain(engine)
    return run_server(engine, server, announce=lambda line: print(line, flush=True))


def _explain(engine: EngineConfig) -> None:
    if engine.trust_remote_code:
        print("--trust-remote-code: not needed; code that comes with checkpoints is never run", file=sys.stderr)


def _load(args: dict[str, Any]) -> LLM:
    """The model, once all flags are known to be good."""
    from rocm_infer.llm import LLM
    from rocm_infer.logs import set_up_logging

    set_up_logging("warning", "text")
    SamplingParams(**_take(args, SamplingParams))
    engine = EngineConfig(**_take(args, EngineConfig))
    _explain(engine)
    return LLM(**_take(args, EngineConfig))


def _params(llm: LLM, args: dict[str, Any]) -> SamplingParams:
    """The checkpoint's sampling defaults with the given flags over them."""
    return dataclasses.replace(llm.default_params, **_take(args, SamplingParams))


def _generate(args: dict[str, Any]) -> int:
    from tqdm import tqdm

    given = args["prompts"] or list(_read_lines(args["input"]))
    if not given:
        raise ValueError("no prompts: give them as arguments, with --input FILE, or on stdin")
    llm = _load(args)
    params = _params(llm, args)
    prompts = [_prompt(llm, line, chat=args["chat"]) for line in given]
    with tqdm(total=len(prompts), unit="prompt", file=sys.stderr, disable=None if len(prompts) > 1 else True) as bar:
        results = llm.generate(prompts, params, on_result=lambda _: bar.update())
    if args["output"]:
        Path(args["output"]).write_text("".join(_json_line(result) for result in results), encoding="utf-8")
    elif args["json"]:
        sys.stdout.writelines(_json_line(result) for result in results)
    else:
        for result in results:
            for output in result.outputs:
                print(output.text)
    return 0


def _read_lines(name: str | None) -> Iterator[Any]:
    """Prompts from a file or stdin: JSON objects, or text as it stands. Empty lines are skipped."""
    if name is None and sys.stdin.isatty():
        return
    lines = sys.stdin if name in (None, "-") else Path(str(name)).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not line.lstrip().startswith("{"):
            if line:
                yield line
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} starts like a JSON object but is not one: {error}") from error


def _prompt(llm: LLM, line: Any, *, chat: bool) -> Any:
    """What LLM.generate takes: text or token ids."""
    if isinstance(line, dict):
        if "messages" in line:
            return llm.chat_prompt(line["messages"])
        line = line.get("prompt", line.get("text"))
        if not isinstance(line, str | list):
            raise ValueError("a JSON prompt needs one of the members prompt, text or messages")
    return llm.chat_prompt([{"role": "user", "content": line}]) if chat and isinstance(line, str) else line


def _json_line(result: Any) -> str:
    for_json = {
        "prompt": result.prompt,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
    }
    if len(result.outputs) > 1:
        for_json["outputs"] = [dataclasses.asdict(output) for output in result.outputs]
    return json.dumps(for_json, ensure_ascii=False) + "\n"


def _chat(args: dict[str, Any]) -> int:
    llm = _load(args)
    params = _params(llm, args)
    opening = [{"role": "system", "content": args["system"]}] if args["system"] else []
    messages = list(opening)
    for said in _said():
        if said == "/quit":
            break
        if said == "/reset":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": said})
        answer = ""
        try:
            for piece in llm.stream(llm.chat_prompt(messages), params):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            pass  # ends this answer, not the conversation
        print()
        messages.append({"role": "assistant", "content": answer})
    return 0


def _replay(args: dict[str, Any]) -> int:
    from rocm_infer.tools.replay import replay

    return replay(Path(args["capsule"]), say=print)


def _compile(args: dict[str, Any]) -> int:
    from rocm_infer.tools.compile import main as compile_kernels

    output = None if args["output"] is None else Path(args["output"])
    return compile_kernels(EngineConfig(**_take(args, EngineConfig)), args["arch"].split(","), output, args["jobs"])


def _explain_kernels(args: dict[str, Any]) -> int:
    from rocm_infer.tools.explain import main as explain

    settings = EngineConfig(**_take(args, EngineConfig)) if "model" in args or args["arch"] else None
    return explain(settings, (args["arch"] or "").split(",") if args["arch"] else (), markdown=args["markdown"])


def _conform(args: dict[str, Any]) -> int:
    from rocm_infer.tools.conform import conform

    return conform(args.pop("base_url"), say=print, **args)


def _said() -> Iterator[str]:
    """The user's messages: prompted for in a terminal, else the lines of stdin."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    sys.exit(main())
