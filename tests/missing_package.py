"""A command of the examples, run where a package is not installed."""

import subprocess
import sys


def run_without(package, module, *argv):
    """Run `python -m module argv` in a process that cannot import `package`."""
    code = (
        f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[1:] = {list(argv)}; "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def assert_refused(run, package, extra):
    """Check that a run failed with one line, which says what to install."""
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        f'error: {package} is not installed; pip install -e ".[{extra}]" installs it.\n'
    )


def assert_help_alone_works(module, package, option, extra="examples,torch"):
    """Check that `--help` names `option`, and that a run fails and says what to install."""
    help_run = run_without(package, module, "--help")
    assert (help_run.returncode, help_run.stderr) == (0, "")
    assert option in help_run.stdout
    assert_refused(run_without(package, module), package, extra)
