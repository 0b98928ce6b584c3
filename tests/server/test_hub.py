# SPDX-License-Identifier: Apache-2.0
"""Names of models: directories, the embedded one, hub ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from rocm_infer import hub
from rocm_infer.hub import ModelNotFound, resolve_model


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(ModelNotFound, match="install the package again"):
        resolve_model("tiny-deepseek")
    folder = tmp_path / "assets" / "tiny-deepseek"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_model("tiny-deepseek") == folder


def test_a_hub_id_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/model-1.0") == tmp_path
    assert asked[0][0] == "org/model-1.0"
    assert "*.safetensors" in asked[0][1]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (OSError("no route to host\nmore"), "no route to host"),
    ],
)
def test_a_failed_fetch_is_one_sentence(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound, match=says) as caught:
        resolve_model("org/model")
    assert "\n" not in str(caught.value)
    assert "--model" in str(caught.value)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "with space", ""])
def test_what_cannot_be_a_hub_id_is_no_directory(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no such directory"):
        resolve_model(name)
