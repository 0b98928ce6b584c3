# SPDX-License-Identifier: Apache-2.0
"""Message checks, and templates as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from rocm_infer.text.chat import ChatError, ChatTemplate, check_messages
from rocm_infer.text.tokenizer import Tokenizer
from tests.text.toys import CONFIG, write_folder

HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 < 3 & 'é'?"}]
TEMPLATES = {
    "plain": "{% for m in messages %}\n  {% if m.role == 'user' %}\n[U] {{ m.content }}\n  {% endif %}\n{% endfor %}",
    "controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ {'a': '<é>'} | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ bos_token }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "variables": "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{{ messages[-1]['content'] }}",
    "prompted": "{{ messages[0].content.split(' ')[-1] }}{% if add_generation_prompt %}[A]{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
def test_agrees_with_transformers(name: str, prompted: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, chat_template=TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|bos|>")
    expected = theirs.apply_chat_template(
        HELLO, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompted, enable_thinking=True
    )
    template = ChatTemplate.load(folder, Tokenizer.load(folder))
    assert template is not None
    assert template.render(HELLO, add_generation_prompt=prompted, variables={"enable_thinking": True}) == expected


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    def rendered(override: Path | None = None) -> str:
        template = ChatTemplate.load(tmp_path, Tokenizer.load(tmp_path), override)
        assert template is not None
        return template.render(HELLO)

    write_folder(tmp_path, chat_template=[{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}])
    assert rendered() == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert rendered() == "J"
    (tmp_path / "mine.jinja").write_text("M")
    assert rendered(tmp_path / "mine.jinja") == "M"
    with pytest.raises(ChatError, match="no such file"):
        rendered(tmp_path / "absent.jinja")


def test_no_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, chat_template=None)
    assert ChatTemplate.load(folder, Tokenizer.load(folder)) is None


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_the_clients_error(source: str, says: str) -> None:
    with pytest.raises(ChatError, match=says):
        ChatTemplate(source, {}).render(HELLO)


def test_a_broken_template_is_refused_at_load() -> None:
    with pytest.raises(ChatError, match="not valid"):
        ChatTemplate("{% for %}", {})


def test_message_text_is_data() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render([{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_continuing_the_final_message() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}", {})
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "It is "}]
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == "<go><It is"
    with pytest.raises(ChatError, match="exclude"):
        template.render(messages, continue_final_message=True)


def test_messages_are_made_uniform() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": 1})}}
    given: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "assistant", "content": None},
    ]
    clean = check_messages(given)
    assert clean[0] == {"role": "system", "content": "a\nb"}
    assert clean[1] == {"role": "user", "content": "hi"}
    assert clean[2]["content"] is None
    assert clean[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert clean[3]["tool_call_id"] == "c1"
    assert clean[4] == {"role": "assistant", "content": ""}
    assert given[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([1], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
    ],
)
def test_bad_messages_are_located(messages: Any, param: str) -> None:
    with pytest.raises(ChatError) as caught:
        check_messages(messages)
    assert caught.value.param == param


def test_specials_reach_the_template(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    template = ChatTemplate.load(folder, Tokenizer.load(folder))
    assert template is not None
    assert template.render(HELLO[1:]) == f"{CONFIG['bos_token']}<|user|>2 < 3 & 'é'?<|end|><|assistant|>"
