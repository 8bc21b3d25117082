"""The import rules of docs/design.md, checked from source: nothing here imports modmoe, but for one subprocess.

Every rule is a function from modules to a list of violations. ``test_rule`` runs it over the real files,
``test_rule_finds`` over small made-up ones, so that no rule passes because it looks at nothing.
"""

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rule 1. Each group imports only its own members and the groups above it.
CORE_ORDER = [
    ["errors", "hosts"],
    ["routing", "growable"],
    ["losses", "experts", "rows"],
    ["pool"],
    ["kernels", "gating", "tasks"],
    ["layer"],
    ["optim", "growth", "checkpoint", "attention", "lora", "segmentation"],
    ["catalog"],
]

# Rule 2. Extensions import the core; plugins import the core, extensions and their own host; joiners anything.
EXTENSIONS = ["conversion", "parallel", "analysis"]
PLUGIN_HOSTS = {
    "continual": ["avalanche"],
    "meta": ["learn2learn"],
    "rl": ["stable_baselines3", "gymnasium", "gym"],
    "vision": ["torchvision", "timm"],
    "multitask": [],
    "language": ["transformers"],
}
JOINERS = ["experiments", "cli", "__main__"]

# Rule 3. What the core may import when it is imported, and what nothing outside the plugins may.
CORE_LIBRARIES = ["torch", "numpy", "scipy", "safetensors"]
TOOLS = ["tensorboard", "torch.utils.tensorboard", "sklearn", "matplotlib", "pandas"]
HOSTS = [host for hosts in PLUGIN_HOSTS.values() for host in hosts] + TOOLS
IMPORT_CALLS = ["import_host", "import_module", "__import__"]

# Rule 4.
OUTSIDE = ["modmoe_envs", "envs", "benchmarks", "configs", "scripts", "tests"]
ENVS_LIBRARIES = ["modmoe_envs", "gymnasium", "numpy", "pygame"]  # pygame paints, as in Gymnasium's own

RANK = {name: rank for rank, group in enumerate(CORE_ORDER) for name in group}
PARTS = {"", *RANK, *EXTENSIONS, *PLUGIN_HOSTS, *JOINERS}


@dataclass(frozen=True)
class Import:
    """``target`` as written, with the imported name: ``from a import b`` gives a.b."""

    target: str
    line: int
    on_import: bool  # runs when the module is imported: not in a function, not for type checking
    by_call: bool  # import_host("...") or importlib.import_module("...")


@dataclass(frozen=True)
class Module:
    name: str
    imports: tuple[Import, ...]

    @property
    def part(self) -> str:
        """The piece of modmoe it belongs to: "losses" for modmoe.losses.z, "" for modmoe itself."""
        return part(self.name)


Modules = dict[str, Module]
Rule = Callable[[Modules], list[str]]


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def within(name: str, packages: list[str] | set[str] | frozenset[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def parse(name: str, source: str, is_package: bool) -> Module:
    package = name if is_package else name.rpartition(".")[0]
    return Module(name, tuple(find_imports(ast.parse(source), package, on_import=True)))


def find_imports(node: ast.AST, package: str, on_import: bool) -> Iterator[Import]:
    match node:
        case ast.Import():
            for alias in node.names:
                yield Import(alias.name, node.lineno, on_import, by_call=False)
        case ast.ImportFrom():
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                target = base if alias.name == "*" else f"{base}.{alias.name}"
                yield Import(target, node.lineno, on_import, by_call=False)
        case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]):
            if called in IMPORT_CALLS:
                yield Import(name, node.lineno, on_import, by_call=True)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.body:
            yield from find_imports(child, package, on_import=False)
        for child in node.orelse:
            yield from find_imports(child, package, on_import)
        return
    inside = on_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from find_imports(child, package, inside)


def read(folder: Path, package: str) -> Modules:
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join((package, *(parts[:-1] if is_package else parts)))
        modules[name] = parse(name, path.read_text(), is_package)
    return modules


def resolve(target: str, modules: Modules) -> str:
    """The module that a target of modmoe names: modmoe.losses.z for modmoe.losses.z.z_loss."""
    while target not in modules and part(target) and not (target.count(".") == 1 and part(target) in PARTS):
        target = target.rpartition(".")[0]
    return target


def modmoe_imports(module: Module, modules: Modules) -> Iterator[tuple[Import, str]]:
    for imported in module.imports:
        if within(imported.target, ["modmoe"]):
            yield imported, resolve(imported.target, modules)


def uncovered(modules: Modules) -> list[str]:
    return [f"{module.name} stands in no group" for module in modules.values() if module.part not in PARTS]


def wrong_order(modules: Modules) -> list[str]:
    return [
        f"{module.name}:{imported.line} imports {target}, which stands below it"
        for module in modules.values()
        if module.part in RANK
        for imported, target in modmoe_imports(module, modules)
        if RANK.get(part(target), len(RANK)) > RANK[module.part]
    ]


def cycles(modules: Modules) -> list[str]:
    graph: dict[str, set[str]] = {}
    for module in modules.values():
        graph[module.name] = edges = set()
        for _, target in modmoe_imports(module, modules):
            edges.add(target)
            # Importing a.b.c also runs a.b, unless we stand inside it.
            while part(target := target.rpartition(".")[0]):
                if not within(module.name, [target]):
                    edges.add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def wrong_group(modules: Modules) -> list[str]:
    core = {"", *RANK}  # "" is modmoe itself, which re-exports the core
    found = []
    for module in modules.values():
        if module.part in EXTENSIONS:
            allowed = core | {module.part}
        elif module.part in PLUGIN_HOSTS:
            allowed = core | {module.part, *EXTENSIONS}
        elif module.part == "experiments":
            allowed = core | {module.part, *EXTENSIONS, *PLUGIN_HOSTS}
        elif module.part in JOINERS:
            allowed = PARTS
        else:
            allowed = core
        found += [
            f"{module.name}:{imported.line} imports {target}"
            for imported, target in modmoe_imports(module, modules)
            if part(target) not in allowed
        ]
    return found


def allowed_in_core(name: str) -> list[str]:
    """What a module of the core may import: one module, which is loaded by a call, holds the kernels in Triton."""
    return [*core_libraries(), "triton"] if name == "modmoe.kernels.triton_kernels" else core_libraries()


def wrong_host(modules: Modules) -> list[str]:
    found = []
    for module in modules.values():
        core = module.part in RANK or module.part == ""
        own = [*PLUGIN_HOSTS[module.part], *TOOLS] if module.part in PLUGIN_HOSTS else []
        path = module.name.split(".")
        if path[1:2] == ["experiments"] and len(path) > 3:  # a domain's loops: imported when one of them is run
            own = [*PLUGIN_HOSTS.get(path[2], []), *TOOLS]
        for imported in module.imports:
            host = within(imported.target, HOSTS)
            if host and imported.on_import and not within(imported.target, own):
                found.append(f"{module.name}:{imported.line} loads {imported.target} when it is imported")
            elif host and core and not imported.by_call:
                found.append(f"{module.name}:{imported.line} imports {imported.target} without import_host")
            elif host and module.part in PLUGIN_HOSTS and not within(imported.target, own):
                found.append(f"{module.name}:{imported.line} imports {imported.target}, another plugin's host")
            elif core and imported.on_import and not within(imported.target, allowed_in_core(module.name)):
                found.append(f"{module.name}:{imported.line} imports {imported.target} in the core")
    return found


def core_libraries() -> frozenset[str]:
    return sys.stdlib_module_names | {"modmoe", *CORE_LIBRARIES}


def wrong_direction(modules: Modules) -> list[str]:
    return [
        f"{module.name}:{imported.line} imports {imported.target}"
        for module in modules.values()
        for imported in module.imports
        if within(imported.target, OUTSIDE)
    ]


def envs_dependencies(modules: Modules) -> list[str]:
    allowed = sys.stdlib_module_names | set(ENVS_LIBRARIES)
    return [
        f"{module.name}:{imported.line} imports {imported.target}"
        for module in modules.values()
        for imported in module.imports
        if not within(imported.target, allowed)
    ]


RULES: list[Rule] = [uncovered, wrong_order, cycles, wrong_group, wrong_host, wrong_direction]


@pytest.fixture(scope="module")
def modmoe_modules() -> Modules:
    return read(ROOT / "modmoe", "modmoe")


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule, modmoe_modules):
    assert "modmoe.routing" in modmoe_modules
    assert rule(modmoe_modules) == []


def test_envs_import_gymnasium_numpy_and_pygame_only():
    modules = read(ROOT / "envs", "modmoe_envs")
    assert "modmoe_envs" in modules
    assert envs_dependencies(modules) == []


def synthetic(sources: dict[str, str]) -> Modules:
    """Modules from sources; a name that is the parent of another, or ends with a dot, is a package."""
    names = [name.rstrip(".") for name in sources]
    modules = {}
    for (raw, source), name in zip(sources.items(), names, strict=True):
        is_package = raw.endswith(".") or any(other.startswith(name + ".") for other in names)
        modules[name] = parse(name, source, is_package)
    return modules


LAZY = "def f():\n    {}"
VIOLATIONS = [
    (wrong_host, {"modmoe.kernels.triton": "import triton"}, "imports triton in the core"),
    (uncovered, {"modmoe.helpers": ""}, "modmoe.helpers stands in no group"),
    (wrong_order, {"modmoe.pool": "from modmoe.layer import MoELayer", "modmoe.layer": ""}, "imports modmoe.layer"),
    (wrong_order, {"modmoe.pool": "import modmoe.layer", "modmoe.layer": ""}, "imports modmoe.layer"),
    (wrong_order, {"modmoe.pool": "from . import layer", "modmoe.": "", "modmoe.layer": ""}, "imports modmoe.layer"),
    (
        wrong_order,
        {"modmoe.losses.z": "from ..layer import x", "modmoe.losses.": "", "modmoe.layer": ""},
        "imports modmoe.layer",
    ),
    (wrong_order, {"modmoe.pool": LAZY.format("import modmoe.layer"), "modmoe.layer": ""}, "imports modmoe.layer"),
    (
        wrong_order,
        {"modmoe.pool": "if TYPE_CHECKING:\n    import modmoe.layer", "modmoe.layer": ""},
        "imports modmoe.layer",
    ),
    (wrong_order, {"modmoe.pool": "from modmoe import ExpertPool", "modmoe.": ""}, "imports modmoe,"),
    (
        cycles,
        {"modmoe.routing": "import modmoe.growable", "modmoe.growable": "from modmoe.routing import Routing"},
        "modmoe.routing",
    ),
    (
        cycles,
        {
            "modmoe.losses.": "from modmoe.losses.z import z_loss",
            "modmoe.losses.z": "from modmoe.losses import balance",
        },
        "modmoe.losses.z",
    ),
    (
        cycles,  # losses.z runs experts/__init__, which comes back to losses
        {
            "modmoe.losses.": "import modmoe.losses.z",
            "modmoe.losses.z": "import modmoe.experts.mlp",
            "modmoe.experts.": "import modmoe.losses",
            "modmoe.experts.mlp": "",
        },
        "modmoe.experts",
    ),
    (wrong_group, {"modmoe.analysis.usage": "import modmoe.conversion"}, "imports modmoe.conversion"),
    (wrong_group, {"modmoe.rl.ppo": "from modmoe.continual import x", "modmoe.continual.": ""}, "modmoe.continual"),
    (wrong_group, {"modmoe.rl.ppo": "import modmoe.experiments", "modmoe.experiments.": ""}, "modmoe.experiments"),
    (wrong_group, {"modmoe.layer": "import modmoe.analysis", "modmoe.analysis.": ""}, "modmoe.analysis"),
    (wrong_group, {"modmoe.": "from modmoe import rl", "modmoe.rl.": ""}, "imports modmoe.rl"),
    (wrong_group, {"modmoe.experiments.rl": "import modmoe.cli", "modmoe.cli": ""}, "imports modmoe.cli"),
    (wrong_host, {"modmoe.layer": LAZY.format("import avalanche.training")}, "without import_host"),
    (wrong_host, {"modmoe.layer": "import pandas"}, "loads pandas"),
    (wrong_host, {"modmoe.layer": "import jsonargparse"}, "imports jsonargparse in the core"),
    (wrong_host, {"modmoe.analysis.tb": "from torch.utils.tensorboard import SummaryWriter"}, "loads torch.utils"),
    (wrong_host, {"modmoe.analysis.tb": "from torch.utils import tensorboard"}, "loads torch.utils"),
    (wrong_host, {"modmoe.experiments.rl": "try:\n    import gymnasium\nexcept ImportError: pass"}, "loads gymnasium"),
    (wrong_host, {"modmoe.experiments.rl": "class A:\n    gym = import_host('gymnasium')"}, "loads gymnasium"),
    (wrong_host, {"modmoe.experiments.rl.loop": "import avalanche"}, "loads avalanche"),
    (wrong_host, {"modmoe.continual.plugin": "import learn2learn"}, "loads learn2learn"),
    (wrong_host, {"modmoe.continual.plugin": LAZY.format("import_host('learn2learn.nn')")}, "another plugin's"),
    (wrong_direction, {"modmoe.rl.ppo": LAZY.format("import modmoe_envs")}, "imports modmoe_envs"),
    (wrong_direction, {"modmoe.rl.ppo": "importlib.import_module('benchmarks.kernels')"}, "imports benchmarks"),
    (envs_dependencies, {"modmoe_envs.grid": "import torch"}, "imports torch"),
    (envs_dependencies, {"modmoe_envs.grid": "from modmoe.pool import ExpertPool"}, "imports modmoe.pool"),
]


@pytest.mark.parametrize(("rule", "sources", "message"), VIOLATIONS)
def test_rule_finds(rule, sources, message):
    found = rule(synthetic(sources))
    assert len(found) == 1
    assert message in found[0]


ALLOWED = {
    "modmoe.": "from modmoe.layer import MoELayer\nfrom modmoe import losses",
    "modmoe.hosts": "import importlib\nfrom modmoe.errors import MissingExtraError",
    "modmoe.errors": "",
    "modmoe.growable": "import json\nimport torch.nn.functional as F\nfrom torch import Tensor",
    "modmoe.kernels.triton_kernels": "import triton.language as tl",
    "modmoe.losses.": "from .z import z_loss\nfrom modmoe.losses.balance import load_balancing_loss",
    "modmoe.losses.z": "import numpy as np",
    "modmoe.losses.balance": "from modmoe.losses.z import real_tokens",
    "modmoe.layer": LAZY.format("import_host('tensorboard').summary"),
    "modmoe.analysis.": LAZY.format("import pandas"),
    "modmoe.continual.": "import avalanche.core\nimport modmoe.analysis\nfrom modmoe import MoELayer",
    "modmoe.rl.": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gymnasium",
    "modmoe.experiments.": "import tqdm\nfrom modmoe.continual import x\nfrom modmoe.rl import y",
    "modmoe.cli": "import jsonargparse\nfrom modmoe.experiments import run",
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_allows(rule):
    assert rule(synthetic(ALLOWED)) == []


def test_envs_rule_allows():
    source = (
        "import math\nimport numpy as np\nimport gymnasium as gym\nfrom .grid import Grid\nfrom modmoe_envs import grid"
    )
    assert envs_dependencies(synthetic({"modmoe_envs.": source, "modmoe_envs.grid": ""})) == []


def test_import_modmoe_loads_no_host_and_no_plugin():
    outer = [f"modmoe.{name}" for name in (*PLUGIN_HOSTS, "experiments", "cli")]
    code = f"import sys, modmoe; print(*[name for name in {HOSTS + outer!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_pyproject_lists_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join((name, *path.parent.relative_to(ROOT / folder).parts))
        for folder, name in (("modmoe", "modmoe"), ("envs", "modmoe_envs"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(listed) == sorted(found)
