"""Fixtures shared by all tests: tiny models saved as folders, and the real data where it is at hand."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.job import tiny
from tests.measured import FIGURES


def pytest_collection_finish() -> None:
    """What the libraries made when they were imported is not looked through for garbage after every few tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a ChatML template; eos is <|im_end|>. See ``tests.job.tiny``."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen3 with a ChatML template and tied embeddings."""
    return tiny.tiny_qwen(tmp_path_factory.mktemp("models") / "tiny-qwen")


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Gemma 3: tied embeddings, a window, bounded logits, a turn's end that is not the text's."""
    return tiny.tiny_gemma(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny GPT-2: Conv1D layers, 256 positions, no pad token, no chat template."""
    return tiny.tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of public data sets beside the checkout (or $TUNEJOB_TEST_DATA); skips where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TUNEJOB_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent; set TUNEJOB_TEST_DATA to a folder with gsm8k/ and others")
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands what a worker of xdist measured to the process that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what a worker measured."""
    FIGURES.extend(getattr(node, "workeroutput", {}).get("figures", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was measured."""
    if FIGURES:
        terminalreporter.section("measured")
        for line in FIGURES:
            terminalreporter.write_line(line)
