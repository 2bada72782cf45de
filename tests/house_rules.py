"""The house rules as functions ``rule(path, source) -> list of violations``; ``path`` is relative to the checkout.

Each violation reads ``path:line: what is wrong``. The rules know nothing of the disk, so a test can feed them bad code.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import PurePosixPath

# Imports go from the right to the left only; modules of one group may import each other.
LAYERS = (
    ("__init__", "types", "errors", "randomness", "config", "old_layout", "io"),
    ("loss", "data", "utils"),
    ("models",),
    ("parallel",),
    ("runtime", "validation"),
    ("trainer",),
    ("demo", "tools"),
    ("main", "migrate", "__main__"),
)
LAYER_OF = {name: number for number, group in enumerate(LAYERS) for name in group}

MAX_FUNCTION, MAX_FILE, MAX_TRAINER, MAX_NESTING = 60, 400, 250, 4

_NAMES = ("flux", "kontext", "qwen", "sdxl", "sd3", "wan", "chroma", "hidream", "lumina")
_TITLES = ("Flux", "Kontext", "Qwen", "Sdxl", "Sd3", "Wan", "Chroma", "HiDream", "Hidream", "Lumina")
# A name counts as a word of snake_case, CamelCase or prose; ``qflux``, ``wandb`` and ``luminance`` hold none.
FAMILY_NAME = re.compile(
    rf"(?<![A-Za-z])(?:{'|'.join(_NAMES)})(?![a-z])"
    rf"|(?<![A-Z])(?:{'|'.join(_TITLES)})(?![a-z])"
    rf"|(?<![A-Za-z])(?:{'|'.join(n.upper() for n in _NAMES)})(?![a-z]|[A-Z](?![a-z]))"
)

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve"}
RUNNERS = ("eval", "exec", "compile")  # built in; not even handed on
UNPACKED = ("extractall", "unpack_archive", "read_pickle")  # of whatever module: archives climb, pickles run
FORBIDDEN_CALLS = {
    "torch.load": "torch.load: use qflux.io.tensors",
    "torch.save": "torch.save: use qflux.io.tensors",
    "yaml.unsafe_load": "yaml.unsafe_load: use yaml.safe_load",
    "yaml.full_load": "yaml.full_load: use yaml.safe_load",
    "os.system": "os.system: use subprocess with a list",
    "os.popen": "os.popen: use subprocess with a list",
    "torch.hub.load": "torch.hub.load runs what it fetches",
    "torch.jit.load": "torch.jit.load: use qflux.io.tensors",
}
FORBIDDEN_IMPORTS = ("torch.load", "torch.save", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load")
OWN_TABLES = (
    "src/qflux/models/optimizers.py",
    "src/qflux/demo/__init__.py",
)  # import modules by names that stand in the same file
FORBIDDEN_FLAGS = ("shell", "trust_remote_code", "allow_pickle")

_CODE_COMMENT = re.compile(
    r"(import [\w.]+|from [\w.]+ import .+|(async )?def \w+\(.*\).*:|class \w+.*:|return .+|print\(.*\)"
    r"|(if|for|while|with) .+:|\w+(\.\w+)+\(.*\))$"
)

_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _is_trainer(path: str) -> bool:
    """Is this one family's file?"""
    found = re.fullmatch(r"src/qflux/trainer/(\w+)_trainer\.py", path)
    return found is not None and found[1] != "base"


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := _dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


def module_of(path: str) -> str:
    """``src/qflux/io/atomic.py`` → ``qflux.io.atomic``; a package's ``__init__`` is the package."""
    name = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a file, ``from a import b`` as ``a.b``."""
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(filter(None, [*parts[: len(parts) - node.level + 1], base]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, str(word.value)) for word in node.args[:1] if isinstance(word, ast.Constant))


def _layer(name: str) -> int | None:
    """Number of a top-level module's layer; ``config_*.py`` are parts of the config."""
    return LAYER_OF["config"] if name.startswith("config_") else LAYER_OF.get(name)


def import_direction(path: str, source: str) -> list[str]:
    """Nothing imports from a layer to its right; a family's file imports no other family's."""
    if not path.startswith("src/qflux/"):
        return []
    own = [*module_of(path).split("."), "__init__"][1]
    if (own_layer := _layer(own)) is None:
        return [f"{path}:1: qflux.{own} has no layer; name it in LAYERS of tests/house_rules.py"]
    bad = []
    for line, name in imported(path, source):
        parts = name.split(".")
        if parts[0] != "qflux" or len(parts) < 2:
            continue
        if (_layer(parts[1]) or 0) > own_layer:
            bad.append(f"{path}:{line}: {own} imports {name}, which is to its right")
        families = [part for part in parts if part.endswith("_trainer") and part != "base_trainer"]
        if _is_trainer(path) and families and families[0] != PurePosixPath(path).stem:
            bad.append(f"{path}:{line}: a trainer imports another trainer, {families[0]}; share downwards")
    return bad


def parallel_only(path: str, source: str) -> list[str]:
    """Only parallel/ imports accelerate or deepspeed; runtime/tracking.py may use accelerate.tracking."""
    if not path.startswith("src/qflux/") or path.startswith("src/qflux/parallel/"):
        return []
    bad = []
    for line, name in imported(path, source):
        tracker = path == "src/qflux/runtime/tracking.py" and name.startswith("accelerate.tracking")
        if name.split(".")[0] in ("accelerate", "deepspeed") and not tracker:
            bad.append(f"{path}:{line}: {name} is imported outside parallel/")
    return bad


def _depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below a node; ``elif`` adds none."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        own = isinstance(child, (*_BLOCKS, *_FUNCTIONS))
        if isinstance(node, ast.If) and isinstance(child, ast.If) and child.col_offset == node.col_offset:
            own = False
        deepest = max(deepest, own + _depth(child))
    return deepest


def budgets(path: str, source: str) -> list[str]:
    """Lines of a file and of each function, nesting in each function."""
    bad = []
    lines = len(source.splitlines())
    limit = MAX_TRAINER if _is_trainer(path) else MAX_FILE
    if lines > limit:
        bad.append(f"{path}:1: {lines} lines, at most {limit}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _FUNCTIONS):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION:
            bad.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
        if (depth := _depth(node)) > MAX_NESTING:
            bad.append(f"{path}:{node.lineno}: {node.name} nests {depth} deep, at most {MAX_NESTING}")
    return bad


def family_names(path: str, source: str) -> list[str]:
    """A family's name stands only in its trainer file and folder, the demo, key tables and the old layouts' names."""
    relative = path.removeprefix("src/qflux/")
    parts = PurePosixPath(relative).parts
    in_family_folder = parts[0] == "trainer" and len(parts) > 2
    key_table = parts[0] == "tools" and "key" in parts[-1]
    old_names = relative in ("old_layout.py", "migrate.py")
    if relative == path or _is_trainer(path) or in_family_folder or key_table or old_names or parts[0] == "demo":
        return []
    return [
        f"{path}:{number}: family name {found.group()!r} in shared code"
        for number, line in enumerate(source.splitlines(), 1)
        for found in FAMILY_NAME.finditer(line)
    ]


def _swallows(node: ast.ExceptHandler) -> bool:
    """Does this handler drop every error without a word?"""
    broad = node.type is None or _dotted(node.type) in ("Exception", "BaseException")
    return broad and all(isinstance(s, ast.Pass | ast.Continue) or _is_ellipsis(s) for s in node.body)


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def _bad_call(node: ast.Call) -> Iterator[str]:
    name = _dotted(node.func)
    if name in FORBIDDEN_CALLS:
        yield FORBIDDEN_CALLS[name]
    if name in ("yaml.load", "yaml.load_all"):
        loaders = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "Loader")]
        if not any("Safe" in _dotted(loader) for loader in loaders):
            yield f"{name} without a Safe loader"
    last = getattr(node.func, "attr", name)
    if last in UNPACKED:
        yield f"{last}: archives and pickles of strangers are not opened"
    if any(word.arg == "weights_only" and getattr(word.value, "value", None) is not True for word in node.keywords):
        yield "weights_only switched off"
    for keyword in node.keywords:
        off = isinstance(keyword.value, ast.Constant) and keyword.value.value in (False, None)
        if keyword.arg in FORBIDDEN_FLAGS and not off:
            yield f"{keyword.arg} switched on"


def _imports_by_name(path: str, node: ast.Call) -> bool:
    """Is a module's name computed, from a config maybe?"""
    words = ("import_module", "__import__", "spec_from_file_location", "run_path", "run_module")
    by_name = _dotted(node.func).split(".")[-1] in words
    known = path in OWN_TABLES or not path.startswith("src/")
    return by_name and not known and not all(isinstance(word, ast.Constant) for word in node.args[:1])


def forbidden(path: str, source: str) -> list[str]:
    """No pickle, no code from data, no shell, no swallowed error."""
    bad = [
        f"{path}:{line}: pickle through {name}"
        for line, name in imported(path, source)
        if name.split(".")[0] in PICKLERS or name in FORBIDDEN_IMPORTS
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in RUNNERS:
            bad.append(f"{path}:{node.lineno}: {node.id}()")
        elif isinstance(node, ast.Call) and _imports_by_name(path, node):
            bad.append(f"{path}:{node.lineno}: a module is imported by a name that is not written here")
        if isinstance(node, ast.Call):
            bad += [f"{path}:{node.lineno}: {what}" for what in _bad_call(node)]
        elif isinstance(node, ast.ExceptHandler) and _swallows(node):
            bad.append(f"{path}:{node.lineno}: an error of any kind is swallowed")
    return bad


def commented_code(path: str, source: str) -> list[str]:
    """Comments that look like statements and parse as such."""
    bad = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ").rstrip()
        if token.type != tokenize.COMMENT or not _CODE_COMMENT.fullmatch(text):
            continue
        try:
            ast.parse(text + (" pass" if text.endswith(":") else ""))
        except SyntaxError:
            continue
        bad.append(f"{path}:{token.start[0]}: commented-out code: {text}")
    return bad


# Put together from pieces, so that this file does not break its own rule.
_MACHINE = re.compile(r"(?<![\w.$}])/(?:" + "|".join(("work", "home", "root")) + r")/")
_HOSTS = re.compile("|".join(("pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs", "deb" + r"\.debian")))
_PROCESS = re.compile(r"\b(sessions?|agents?)\b|\bissues? ?#?\d+", re.IGNORECASE)


def machine_paths(path: str, source: str) -> list[str]:
    """No path of one machine and no registry's host in any file."""
    return [
        f"{path}:{number}: {found.group()!r} belongs to one machine"
        for number, line in enumerate(source.splitlines(), 1)
        for found in (*_MACHINE.finditer(line), *_HOSTS.finditer(line))
    ]


def own_words(path: str, source: str) -> list[str]:
    """The project speaks of itself, not of how it was made."""
    return [
        f"{path}:{number}: {found.group()!r} speaks of how the project is made"
        for number, line in enumerate(source.splitlines(), 1)
        for found in _PROCESS.finditer(line)
    ]


def attributes_read(source: str) -> set[str]:
    """Names read as ``.name`` or by a literal ``getattr(x, "name")``."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and _dotted(node.func) == "getattr" and len(node.args) > 1:
            names.add(str(getattr(node.args[1], "value", "")))
    return names


def links(path: str, source: str) -> list[str]:
    """Relative targets of Markdown links and images, and paths of the checkout that a YAML comment names."""
    if path.endswith(".md"):
        pairs = re.findall(r"\]\(([^)\s#]+)[^)]*\)|<img[^>]+src=\"([^\"]+)\"", source)
        return [link for pair in pairs for link in pair if link and not re.match(r"[a-z]+:", link)]
    return re.findall(r"#.*?\b((?:docs|configs|accelerate_configs|scripts|bench)/[\w./-]*\w)", source)


def read_budgets(text: str) -> dict[str, int]:
    """Folder → seconds from the table of CONTRIBUTING.md, rows such as ``| tests/unit | 180 |``."""
    return {folder: int(seconds) for folder, seconds in re.findall(r"^\| (tests/\w+) \| (\d+) \|", text, re.MULTILINE)}
