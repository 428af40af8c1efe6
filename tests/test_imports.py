"""The core imports numpy alone, scipy where it is used; imports point one way; both checks can fail."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nab

PACKAGE = Path(nab.__file__).parent
HEAVY = ["torch", "transformers", "scipy", "matplotlib", "rich", "click", "pandas", "joblib"]
HEAVY += ["prometheus_client", "vllm", "llama_cpp"]

LEVELS = [  # a module imports only from its own level and those before it
    {"nab.types", "nab.checks"},
    {"nab.acceptance", "nab.audit", "nab.losses", "nab.pool", "nab.sampling", "nab.schemes"},
    {"nab.learners"},
    {"nab.selector"},
    {"nab.wrappers"},
    {"nab.decode", "nab.together"},
    {"nab.sim"},
    {"nab.measure", "nab.prometheus", "nab.prompts"},
    {"nab.backends"},
    {"nab.experiment"},
    {"nab.replays"},
    {"nab.console", "nab.plots"},
    {"nab.offline"},
    {"nab.cli", "nab.__main__"},
]


def heavy_modules_after(statement: str) -> list[str]:
    code = f"{statement}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_the_core_imports_nothing_heavy():
    assert (
        heavy_modules_after("import nab, nab.learners, nab.sim, nab.wrappers, nab.measure, nab.audit") == []
    )


def test_hooks_into_engines_need_neither_torch_nor_the_engine():
    assert heavy_modules_after("import nab.backends.vllm, nab.backends.llama_cpp, nab.prometheus") == []


def test_the_command_names_the_extra_that_it_needs():
    without = "import sys; sys.modules['click'] = None; import nab.__main__; nab.__main__.main()"
    result = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "the command needs click: pip install 'not-a-bandit[cli]'\n"


def test_that_check_can_fail():
    assert {"torch", "transformers"} <= set(heavy_modules_after("import nab, nab.backends.torch"))
    assert heavy_modules_after("import nab, scipy.special") == ["scipy"]


def level(module: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if any(f"{module}.".startswith(f"{n}.") for n in names))


def imported(source: str) -> set[str]:
    tree = ast.parse(source)
    guarded = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in set(ast.walk(tree)) - guarded:
        if isinstance(node, ast.ImportFrom) and node.module:
            parent = PACKAGE.parent / node.module.replace(".", "/")
            found |= {
                f"{node.module}.{a.name}" if (parent / f"{a.name}.py").exists() else node.module
                for a in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("nab.")}


def wrong_arrows(module: str, source: str) -> list[str]:
    return [name for name in imported(source) if level(name) > level(module)]


def modules() -> list[tuple[str, Path]]:
    names = [
        (".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts), p) for p in PACKAGE.rglob("*.py")
    ]
    return sorted((name.removesuffix(".__init__"), path) for name, path in names if name != "nab.__init__")


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_one_way(module, path):
    assert wrong_arrows(module, path.read_text()) == []


def test_the_arrow_check_can_fail():
    assert wrong_arrows("nab.learners.hedge", "from nab.selector import Selector") == ["nab.selector"]
    assert wrong_arrows("nab.types", "from nab import decode") == ["nab.decode"]
