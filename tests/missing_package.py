"""A command of the examples, run where a package is not installed."""

import subprocess
import sys


def assert_help_alone_works(module, package, option):
    """Check that `--help` names `option`, and that a run fails and says what to install."""

    def run(*argv):
        code = (
            f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv[1:] = {list(argv)}; "
            f"runpy.run_module({module!r}, run_name='__main__')"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    help_run, failed = run("--help"), run()
    assert (help_run.returncode, help_run.stderr) == (0, "")
    assert option in help_run.stdout
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        f'error: {package} is not installed; pip install -e ".[test]" installs it.\n'
    )
