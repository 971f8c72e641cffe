"""Build .venv when it is missing or stale; return at once when it is not.

Run by make with the interpreter that .venv is to be made of; needs nothing but its
standard library. The stamp in .venv says what it was built from. It is removed before
anything is touched and written last, so a build that was interrupted is not mistaken
for a whole one. A lock lets one build run at a time. pip runs as the user configured
it; its output goes to .venv/install.log.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - make may find any python3
    sys.exit(
        "vllm-resident needs Python 3.11 or newer, and {} is {}.{}.{}. "
        "Name another one: make PYTHON=/path/to/python3.11".format(
            sys.executable, *sys.version_info[:3]
        )
    )

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "stamp.json"
LOG = VENV / "install.log"
LOCK = ROOT / ".venv.lock"
REQUIREMENTS = ROOT / "requirements" / "cpu-dev.txt"
PYPROJECT = ROOT / "pyproject.toml"

# Serves the CPU builds of torch ("2.13.0+cpu"), which package registries do not.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TELL_EVERY_S = 10.0
LOG_TAIL_LINES = 15
LOG_LINE_CHARS = 160  # pip names every version it knows of in one line


class BuildError(Exception):
    """A step of the build failed; the message is what the user reads."""


def main() -> None:
    if read_stamp() == wanted_stamp():
        return
    started = time.monotonic()
    with build_lock() as lock_fd:
        have, want = read_stamp(), wanted_stamp()
        if have == want:
            return  # another make built it while this one waited
        try:
            build(want, have, lock_fd)
        except BuildError as failure:
            sys.exit(f"{failure}\nThe whole output of pip is in {LOG}")
        except KeyboardInterrupt:
            sys.exit("\ninterrupted: the next make starts the build of .venv again")
    say(f".venv is ready ({time.monotonic() - started:.0f} s)")


def wanted_stamp() -> dict[str, str]:
    """Return what a .venv that is up to date was built from."""
    return {
        # Scripts in bin/ name the folder: a tree that was moved or copied is stale.
        "root": str(ROOT),
        "python": sys.version,
        "requirements": hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest(),
        "project": hashlib.sha256(PYPROJECT.read_bytes()).hexdigest(),
    }


def read_stamp() -> dict[str, str] | None:
    """Return what .venv was built from; None where it is missing or unfinished."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_bytes())
    except (OSError, ValueError):
        return None
    # A link to an interpreter that has since been removed does not exist.
    return stamp if VENV_PYTHON.exists() else None


@contextlib.contextmanager
def build_lock() -> Iterator[int]:
    """Hold the lock of this tree's build; yield its file descriptor."""
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another make is building .venv: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def build(want: dict[str, str], have: dict[str, str] | None, lock_fd: int) -> None:
    """Bring .venv to `want`: from nothing, unless only pyproject.toml differs."""
    STAMP.unlink(missing_ok=True)
    if have is None or {**have, "project": ""} != {**want, "project": ""}:
        say("building .venv (some 3.5 GB, minutes; needed once)")
        if VENV.exists():
            shutil.rmtree(VENV)
        create_venv()
        install_requirements(lock_fd)
        check_imports()
    pip(["install", "--no-deps", "--no-build-isolation", "-e", str(ROOT)], lock_fd)
    scratch = STAMP.with_suffix(".new")
    scratch.write_text(json.dumps(want, indent=1) + "\n")
    scratch.rename(STAMP)


def create_venv() -> None:
    # The interpreter under it where this one is of a virtual environment itself: make
    # may run with .venv activated, and that has just been removed.
    python = getattr(sys, "_base_executable", sys.executable)
    command = [python, "-m", "venv", str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(
            f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
            "(On Debian and Ubuntu the module is in a package of its own: python3-venv)"
        )


def install_requirements(lock_fd: int) -> None:
    """Install the pinned set, torch first where it needs an index of its own."""
    pins = [
        line
        for line in REQUIREMENTS.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    torch_pin = next(pin for pin in pins if pin.startswith("torch=="))
    # Without bytecode: half of it would never be read, the rest is made on import.
    options = ["install", "--no-deps", "--no-compile", "--progress-bar", "off"]
    if not finds(torch_pin):
        # By itself, so that nothing else is taken from that index.
        say(f"{torch_pin} from {TORCH_INDEX}")
        pip([*options, "--extra-index-url", TORCH_INDEX, torch_pin], lock_fd, total=1)
    pip([*options, "-r", str(REQUIREMENTS)], lock_fd, total=len(pins))


def finds(pin: str) -> bool:
    """Tell whether pip as the user configured it finds `pin` (name==version).

    `pip index versions` asks without downloading; a dry run of an install would
    fetch the whole wheel from most indexes.
    """
    name, version = pin.split("==")
    done = subprocess.run(
        [VENV_PYTHON, "-m", "pip", "index", "versions", name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    LOG.write_text(done.stdout + done.stderr)
    return version in re.split(r"[\s,()]+", done.stdout)


def pip(arguments: list[str], lock_fd: int, total: int = 0) -> None:
    """Run pip in .venv, its output to the log, a line of progress to the terminal."""
    command = [str(VENV_PYTHON), "-m", "pip", "--no-input", *arguments]
    started = time.monotonic()
    with LOG.open("a") as log:
        before = log.tell()
        # pip inherits the lock: should this process be killed, the next build still
        # waits for the pip it left behind.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock_fd],
        )
    try:
        while True:
            try:
                status = process.wait(timeout=TELL_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                if total:
                    seconds = time.monotonic() - started
                    say(f"{seconds:4.0f} s  {progress(total, before)}")
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status != 0:
        tail = [line[:LOG_LINE_CHARS] for line in readable_log()[-LOG_TAIL_LINES:]]
        raise BuildError(
            "\n".join(tail) + f"\npip {arguments[0]} failed with status {status}."
        )


def progress(total: int, before: int) -> str:
    """Return how far pip has come, as its log from `before` and site-packages show."""
    lines = readable_log(before)
    if any(line.startswith("Installing collected packages") for line in lines):
        done = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
        return f"installing: {min(done, total)} of {total} packages"
    # Without dependencies to resolve pip names every package once as it fetches it.
    named = {
        line.split()[1].partition("==")[0]
        for line in lines
        if line.startswith("Collecting ")
    }
    return f"fetching: {min(len(named), total)} of {total} packages"


def readable_log(start: int = 0) -> list[str]:
    """Return the log from byte `start`, without a remark per package and index."""
    text = LOG.read_bytes()[start:].decode(errors="replace")
    return [line for line in text.splitlines() if "is ignored: it is" not in line]


def check_imports() -> None:
    """Import torch and vLLM, which also writes the bytecode the first run needs."""
    say("importing torch and vLLM for the first time")
    program = (
        "import json, torch, vllm;"
        "print(json.dumps([torch.__version__, torch.version.cuda, vllm.__version__]))"
    )
    done = subprocess.run(
        [VENV_PYTHON, "-c", program],
        cwd=VENV,  # not the repository: what is installed is what is tested
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(f"{done.stderr}torch or vLLM does not import.")
    torch_version, cuda, vllm_version = json.loads(done.stdout.splitlines()[-1])
    if cuda is not None:
        raise BuildError(
            f"torch {torch_version} is a build for CUDA {cuda}; this set-up needs the "
            "CPU build (torch==...+cpu). Does a pip setting (pip config list) or "
            "PIP_* variable name an index that replaces it?"
        )
    say(f"torch {torch_version}, vLLM {vllm_version}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
