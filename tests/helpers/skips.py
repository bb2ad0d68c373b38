"""Why tests may be skipped: every reason that is known, and what it means that they are.

With `--known-skips`, as CI runs them, a run ends with its skipped tests by reason, and fails where a reason
is not listed here: else a test that never runs looks like one that passes.
"""

import re
from collections import Counter

import pytest

PEERS = "bitsandbytes|gguf|gptqmodel|hqq|llama_cpp|llmcompressor|optimum|sinq|torchao"
KNOWN: dict[str, str] = {
    r"the processor has no byte products": "compute='fast' has nothing to round there: it is the exact path",
    r"gcc has no sanitizers here": "libasan and libubsan are packages of their own on some systems",
    r"no gcc, whose sanitizers this needs": "another compiler builds the library; the sanitizers are gcc's",
    r"Linux alone lists them in /proc": "loaded libraries are counted in /proc/self/maps",
    r"memory is counted on Linux only": "the peak is read from /proc and reset there",
    r"there is no full device here": "/dev/full stands for a disk that is full",
    r"no browser is here: .*": "the report's page is looked at in Chromium, which pip does not install",
    r"espeak-ng reads aloud": "the speech data is made by espeak-ng, which pip does not install",
    rf"ModuleNotFoundError: No module named '({PEERS})'": "a peer, measured in an environment of its own",
    r"could not import 'llama_cpp': .*": "llama-cpp-python is compiled for minutes where it is installed",
    r"transformers \S+ wants PEFT \S+, and this is \S+": "PEFT's release comes after that of transformers",
    r"of transformers \S+ there is no record: .*": "a model type that is new or differs",
    r"Triton is not installed": "it has no wheel for this system; the kernels are tested where it has",
    r"Triton's interpreter has a process of its own": "tests/kernels/test_triton.py starts it",
    r"nothing is compiled in the interpreter": "it was asked for, and Triton then has no kernels to compile",
    r"no vLLM engine: SVDQ_VLLM_PYTHON is not set": "it has an environment of its own of 3 GB: docs/vllm.md",
    r"no CUDA device is here": "graphs, compiled calls, training steps; examples/bench_gpu.py runs them",
    r".*/glue/\*/dev\.jsonl: not there; set SVDQ_DATA .*": "data that the repository has not",
}
"""Reason, the whole of it -> why that is no fault."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--known-skips`."""
    text = "list skipped tests by reason, and fail where a reason is not in tests/helpers/skips.py"
    parser.addoption("--known-skips", action="store_true", help=text)


def unknown(reasons: Counter[str]) -> list[str]:
    """Those reasons that are not listed."""
    return [reason for reason in reasons if not any(re.fullmatch(known, reason) for known in KNOWN)]


def reasons_of(config: pytest.Config) -> Counter[str]:
    """Reason -> how many were skipped for it, in all processes; a worker itself says nothing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter and not hasattr(config, "workerinput") else []
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that passed, if a reason is unknown."""
    if session.config.getoption("known_skips") and unknown(reasons_of(session.config)):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the reasons, how often, and what is known of them."""
    reasons = reasons_of(config)
    if not config.getoption("known_skips") or not reasons:
        return
    terminalreporter.section("skipped, and why")
    for reason, count in sorted(reasons.items()):
        why = next((KNOWN[known] for known in KNOWN if re.fullmatch(known, reason)), None)
        told = f"known: {why}" if why else "UNKNOWN: list it in tests/helpers/skips.py, or let the tests run"
        terminalreporter.line(f"{count:4} {reason}\n     {told}", red=why is None)
