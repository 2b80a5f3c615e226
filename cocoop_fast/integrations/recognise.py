"""Whether a trainer computes what the reference's trainers compute: by the form of its code.

What a trainer of CoOp's repository computes is decided by three model classes of its module and two of its methods. Each
is compared with the forms that are known to be the reference's: the syntax tree without comments, docstrings, annotations
and ``print``, of which only a digest is kept. So a fork with another layout or other messages is recognised, and one with
another loss is not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import Any

METHODS = ("build_model", "forward_backward")
# What forward_backward may call: Dassl's own, or a fork's.
DASSLS_OWN = ("model_backward_and_update", "model_zero_grad", "model_backward", "model_update")
_NOT_FORM = ("ctx", "kind", "type_comment", "type_params")  # of syntax trees

# By trainer and part: digests of the forms that KaiyangZhou/CoOp has had.
# `tools/check_reference.py --digests COOP` prints those of a checkout.
KNOWN: dict[str, dict[str, frozenset[str]]] = {
    "CoCoOp": {
        "TextEncoder": frozenset(["f1d3bc23f164da5f"]),
        "PromptLearner": frozenset(["3f98c54b90bc47fe"]),
        "CustomCLIP": frozenset(["302ab4251900510b"]),
        "build_model": frozenset(["26b94f2139f5c34c"]),
        "forward_backward": frozenset(["d979369bee204614"]),
    },
    "CoOp": {
        "TextEncoder": frozenset(["f1d3bc23f164da5f"]),
        "PromptLearner": frozenset(["8ec6d79082913fb5", "20f11a4ecc83a94c"]),
        "CustomCLIP": frozenset(["9ddaa259ecba419b"]),
        "build_model": frozenset(["ea5f43733cb330f0", "61bba260c9cd0912", "2124989e89b9ac6c"]),
        "forward_backward": frozenset(["31b0b5ef050362fb", "de9df4eddf7ef9c7"]),
    },
}


def digest(source: str) -> str:
    """Of a class or function, by its form."""
    tree = _Normal().visit(ast.parse(textwrap.dedent(source)))
    return hashlib.sha256(repr(_form(tree)).encode()).hexdigest()[:16]


def parts(trainer: type) -> dict[str, str | None]:
    """Digest of each part of a trainer that decides what it computes; None where there is none, or no source."""
    found: dict[str, Any] = {name: getattr(trainer, name, None) for name in METHODS}
    model = _called_in(found["build_model"], "CustomCLIP")
    found["CustomCLIP"] = model
    for name in ("PromptLearner", "TextEncoder"):
        found[name] = _called_in(getattr(model, "__init__", None), name)
    return {name: None if part is None else _digest_of(part) for name, part in found.items()}


def differences(name: str, trainer: type) -> tuple[str, ...]:
    """The parts of a trainer that are not in a form of the reference's trainer of this name; none if it is the same."""
    known = KNOWN.get(name, {})
    differing = [part for part, found in parts(trainer).items() if found not in known.get(part, frozenset())]
    dassl = _package(getattr(trainer, "register_model", trainer))
    differing += [
        part for part in DASSLS_OWN if hasattr(trainer, part) and _package(getattr(trainer, part)) != dassl
    ]
    return tuple(differing)


def _called_in(function: Any, name: str) -> Any:
    """What a name means inside of a function."""
    return getattr(function, "__globals__", {}).get(name)


def _package(part: Any) -> str:
    return str(part.__module__).partition(".")[0]


def _form(node: Any) -> Any:
    """Nested tuples of what is there, so that versions of Python that add fields give the same."""
    if isinstance(node, ast.AST):
        fields = ((name, _form(value)) for name, value in ast.iter_fields(node) if name not in _NOT_FORM)
        return type(node).__name__, *((name, value) for name, value in fields if value not in (None, ()))
    return tuple(map(_form, node)) if isinstance(node, list) else node


def _digest_of(part: Any) -> str | None:
    try:
        return digest(inspect.getsource(part))
    except (OSError, TypeError, SyntaxError):
        return None


class _Normal(ast.NodeTransformer):
    """Without what changes no number. (Comments and layout are not in a syntax tree.)"""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        value = node.value
        is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        is_print = (
            isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print"
        )
        return None if is_text or is_print else self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)
