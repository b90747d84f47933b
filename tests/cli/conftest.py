import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tiny_path) -> Path:
    """A tiny model with a chat template."""
    return tiny_path("llama")


@pytest.fixture(scope="session")
def mute(tmp_path_factory) -> Path:
    """A tiny model that was not made to chat."""
    import tiny

    path = tiny.write_tiny("qwen3", tmp_path_factory.mktemp("mute") / "mute")
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
