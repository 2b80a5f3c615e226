"""The engine at the seam between a fork's prompt learner and its text encoder: the fork keeps both, and all its losses.

CoOp's descendants call ``text_encoder(prompts, tokenized_prompts)`` with dense prompts (n, L, d). After
:func:`accelerate`, that call is computed by the tree where the prompts have the learned-context form: tokens of CLIP,
and M learned vectors a prompt. Which entries are learned, and whether all prompts share them, is read off the tensors:

    T = J w,    the derivative of the prompts along a random direction w of all that they depend on.

T is zero exactly where an entry does not depend on anything learned, and the same for all prompts exactly if they depend
on it in the same way (both with probability 1). Two backward passes through the fork's learner give it, once for each form
of prompts. In every call the values are compared: tokens with their embeddings, and shared contexts with each other.

Deep prompts, which take the place of the context in layers 1, 2, ..., are found where MaPLe and PromptSRC have them: in a
third argument of the call, or as the one thing that is learned in each of those blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cocoop_fast.clip.frozen import ClipModel, FrozenCLIP, text_module
from cocoop_fast.engine.encoder import TreeTextEncoder
from cocoop_fast.errors import UserError
from cocoop_fast.prompts.layout import PromptLayout
from cocoop_fast.prompts.tree import ClassTree

FORMS = 4  # kept: of training and evaluation classes, of one and of several encoders' prompts
# Largest difference from the fork's own features, relative to the largest of them, when a form is first seen.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def accelerate(model: Any, clip_model: ClipModel, say: Callable[[str], None] = print) -> None:
    """Let the tree compute the text features of a model of a fork, in place.

    Args:
        model: with a ``text_encoder`` that is called as ``text_encoder(prompts, tokenized_prompts)``, prompts (n, L, d) and
            tokens (n, L), and gives features (n, E) that are not normalised; or with deep prompts as well, (M, d) each.
            Its class becomes a subclass of its own.
        clip_model: the CLIP that the text encoder was made of.
        say: told, once each, what is computed by the fork's encoder after all, and why.

    Raises:
        UserError: there is no such encoder, something in it is learned besides deep prompts, or the CLIP is not supported.
    """
    encoder = getattr(model, "text_encoder", None)
    if not isinstance(encoder, nn.Module):
        raise UserError("the model has no `text_encoder`")
    if isinstance(encoder, _TreeEncoded):
        return
    seam = Seam(clip_model, say)
    learned = {id(one): name for name, one in encoder.named_parameters() if one.requires_grad}
    for one in seam.deep_of_blocks():
        learned.pop(id(one), None)
    if learned:
        raise UserError(f"its text encoder learns {next(iter(learned.values()))} ({len(learned)} tensors)")
    encoder.__class__ = type(type(encoder).__name__, (_TreeEncoded, type(encoder)), {})
    encoder._seam = seam  # type: ignore[assignment]


class _TreeEncoded(nn.Module):
    """The first base of a fork's text encoder that has a seam."""

    _seam: Seam

    def forward(self, prompts: Any, tokenized_prompts: Any = None, *more: Any, **named: Any) -> Any:
        def dense() -> Any:
            given = (prompts,) if tokenized_prompts is None else (prompts, tokenized_prompts)
            return super(_TreeEncoded, self).forward(*given, *more, **named)

        deep, known = (
            self._seam.deep_of_blocks(),
            isinstance(prompts, Tensor) and isinstance(tokenized_prompts, Tensor),
        )
        if known and len(more) == 1 and not named and not deep:
            known = isinstance(more[0], Sequence | nn.ParameterList) and all(
                isinstance(one, Tensor) for one in more[0]
            )
            deep = [*more[0]] if known else []
        elif more or named:
            known = False
        if not known:
            self._seam.tell("it is called with more than prompts, tokens and deep prompts")
            return dense()
        own = {id(one) for one in deep}
        if any(value.requires_grad and id(value) not in own for value in self.parameters()):
            self._seam.tell("something in it is learned")
            return dense()
        return self._seam.encode(prompts, tokenized_prompts, dense, deep)


@dataclass(frozen=True, eq=False)
class Form:
    """Prompts as the tree knows them. n prompts, M context vectors of each, J tokens up to the last EOT.

    Args:
        encoder: of the class tree.
        tokens: (n, L) as they were given.
        constant: (n, J) which entries are tokens up to their prompt's EOT.
        expected: (c, d) the embeddings of those.
        slots: (n, M) positions of the context vectors.
        leaves: what the prompts depend on.
        shared: all prompts have the same context, and depend on it in the same way.
        n_deep: the number of deep prompts.
        halved: they are rounded to float16, as MaPLe's and PromptSRC's blocks do in every precision.
    """

    encoder: TreeTextEncoder
    tokens: Tensor
    constant: Tensor
    expected: Tensor
    slots: Tensor
    leaves: frozenset[Tensor]
    shared: bool
    n_deep: int = 0
    halved: bool = False

    def encode(self, context: Tensor, deep: Sequence[Tensor]) -> Tensor:
        """Features (n, E) under contexts of this form."""
        prompts = [_halved(one) if self.halved else one for one in deep]
        return self.encoder(context, [one.expand_as(context) for one in prompts])

    def contexts(self, prompts: Tensor, tokens: Tensor, leaves: frozenset[Tensor]) -> Tensor | None:
        """(M, d) or (n, M, d) context vectors of prompts of this form; None if they are of another."""
        if (
            prompts.shape[:2] != tokens.shape
            or tokens.shape != self.tokens.shape
            or not leaves <= self.leaves
        ):
            return None
        if not torch.equal(tokens, self.tokens):
            return None
        with torch.no_grad():
            read = prompts[:, : self.constant.shape[1]]
            if not torch.equal(read[self.constant], self.expected.to(prompts)):
                return None
        context = prompts.gather(1, self.slots[:, :, None].expand(-1, -1, prompts.shape[2]))
        if not self.shared:
            return context
        return context[0] if torch.equal(context, context[:1].expand_as(context)) else None


class Seam:
    """The trees of the prompts that a text encoder has been given.

    Args:
        clip_model: the CLIP that it is of.
        say: see :func:`accelerate`.
    """

    def __init__(self, clip_model: ClipModel, say: Callable[[str], None]) -> None:
        self._clip, self._say = clip_model, say
        self._frozen = FrozenCLIP(clip_model)
        self._forms: list[Form] = []
        self._told: set[str] = set()

    def tell(self, why: str) -> None:
        """Once for each reason."""
        if why not in self._told:
            self._told.add(why)
            self._say(f"cocoop_fast: the text encoder's own forward is used where {why}")

    def deep_of_blocks(self) -> list[Tensor]:
        """The deep prompts (M, d) that the tower's blocks have learned: one in each of blocks 1, 2, ..., and nothing else."""
        first, *blocks = text_module(self._clip).transformer.resblocks
        learned = [[one for one in block.parameters() if one.requires_grad] for block in (first, *blocks)]
        deep = [own[0] for own in learned[1:] if len(own) == 1]
        alike = {tuple(one.shape) for one in deep}
        wanted = [0] + [1] * len(deep) + [0] * (len(blocks) - len(deep))
        fit = [len(own) for own in learned] == wanted and len(alike) == 1 and len(alike.pop()) == 2
        return deep if fit else []

    def encode(
        self,
        prompts: Tensor,
        tokenized_prompts: Tensor,
        dense: Callable[[], Tensor],
        deep: Sequence[Tensor] = (),
    ) -> Tensor:
        """Features (n, E) of prompts (n, L, d) and deep ones (M, d), by the tree or by the fork's own ``dense``."""
        if prompts.ndim != 3 or tokenized_prompts.shape != prompts.shape[:2]:
            self.tell("prompts are not (n, L, d) with tokens (n, L)")
            return dense()
        tokens = tokenized_prompts.detach().to("cpu", torch.int64)
        leaves, deep = (
            frozenset(leaves_of(prompts)),
            deep[: self._frozen.layers - 1],
        )  # a shallow tower reads no more
        for form in self._forms:
            context = form.contexts(prompts, tokens, leaves) if form.n_deep == len(deep) else None
            if context is not None:
                return form.encode(context, deep)
        found = self._new_form(prompts, tokens, dense, deep)
        context = None if found is None else found.contexts(prompts, tokens, leaves)
        if found is None or context is None:
            return dense()
        self._forms = [found, *self._forms][:FORMS]
        return found.encode(context, deep)

    def _new_form(
        self, prompts: Tensor, tokens: Tensor, dense: Callable[[], Tensor], deep: Sequence[Tensor]
    ) -> Form | None:
        try:
            form = replace(self._read(prompts, tokens), n_deep=len(deep))
        except UserError as error:
            self.tell(str(error))
            return None
        with torch.no_grad():
            context = form.contexts(prompts, tokens, form.leaves)
            if context is None:
                self.tell("the prompts are not of tokens and contexts")
                return None
            if any(one.shape != context.shape[-2:] for one in deep):
                self.tell("its deep prompts are not of the shape of its context")
                return None
            own, forms = dense().double(), [form, replace(form, halved=True)][: 1 + bool(deep)]
            errors = [_error(one.encode(context, deep).double(), own) for one in forms]
        half = torch.is_autocast_enabled(prompts.device.type)
        if not min(errors) <= TOLERANCE[torch.float16 if half else self._frozen.dtype]:
            self.tell("it does not compute what CLIP's text tower does")
            return None
        return forms[errors.index(min(errors))]

    def _read(self, prompts: Tensor, tokens: Tensor) -> Form:
        """The form of prompts that has not been seen yet.

        Raises:
            UserError: they have none, and why.
        """
        ends = tokens.argmax(dim=1)
        length = int(ends.max()) + 1
        read = (torch.arange(length) <= ends[:, None]).to(prompts.device)
        leaves = leaves_of(prompts)
        change = _derivative(prompts, leaves)[:, :length] if leaves else None
        learned = torch.zeros_like(read) if change is None else (change != 0).any(dim=2)
        named = self._tokens_of(prompts[:, :length].detach(), tokens)
        constant = read & ~learned & (named >= 0)
        is_slot = read & ~constant
        m = int(is_slot[0].sum())
        if not m:
            raise UserError("nothing is learned in the prompts")
        if (is_slot.sum(dim=1) != m).any() or is_slot[:, 0].any():
            raise UserError("prompts have contexts of different lengths, or learned start tokens")
        if is_slot.gather(1, ends[:, None].to(is_slot.device)).any():
            raise UserError("an end-of-text token is learned")
        slots = is_slot.nonzero()[:, 1].view(len(tokens), m)
        symbols = torch.zeros_like(tokens)
        symbols[:, :length] = torch.where(constant, named, 0).cpu()
        symbols.scatter_(1, slots.cpu(), -1 - torch.arange(m).expand(len(tokens), -1))
        index = slots[:, :, None].expand(-1, -1, prompts.shape[2])
        context = prompts.detach().gather(1, index)
        shared = torch.equal(context, context[:1].expand_as(context))
        if change is not None:
            shared = shared and _same_for_all(change.gather(1, index))
        tree = ClassTree.from_layout(PromptLayout(symbols, m, class_specific=not shared))
        encoder = TreeTextEncoder(self._clip, tree)
        expected = self._frozen.text_weights().token_embedding[named[constant]]
        return Form(encoder, tokens, constant, expected, slots, frozenset(leaves), shared)

    def _tokens_of(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """(n, J): the token whose embedding an entry is; -1 if it is none of the given ones'.

        The name may stand elsewhere than in the tokens ("front", "middle"), so every entry may be any of them.
        """
        table = self._frozen.text_weights().token_embedding
        known = tokens.unique().to(table.device)
        rows = table[known].to(prompts)
        ray = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ray = ray.to(rows.device)
        order = (rows.double() @ ray).argsort()
        rows, known = rows[order], known[order]
        keys, wanted = rows.double() @ ray, prompts.double() @ ray
        found = torch.full(wanted.shape, -1, device=prompts.device)
        # The sums of equal rows may differ in the last digit, by how the product is cut up: its neighbours are looked at.
        place = torch.searchsorted(keys, wanted)
        for offset in (-1, 0, 1):
            at = (place + offset).clamp(0, len(keys) - 1)
            found = torch.where((rows[at] == prompts).all(dim=2), known[at], found)
        return found


def _error(features: Tensor, expected: Tensor) -> float:
    if features.shape != expected.shape:
        return float("inf")
    return float((features - expected).abs().max() / expected.abs().max())


def _halved(prompt: Tensor) -> Tensor:
    """Rounded to float16 (the sum is exact); its gradient is not."""
    return prompt + (prompt.half().to(prompt.dtype) - prompt).detach()


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The learned tensors that a tensor depends on."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    leaves, seen, todo = [], {tensor.grad_fn}, [tensor.grad_fn]
    while todo:
        node: Any = todo.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return leaves


def _derivative(prompts: Tensor, leaves: list[Tensor]) -> Tensor:
    """J w for a random w, (n, L, d), by differentiating the gradient: v -> J' v -> <J' v, w>.

    Raises:
        UserError: the fork's learner cannot be differentiated twice.
    """
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    try:
        with torch.enable_grad():
            v = torch.zeros_like(prompts, requires_grad=True)
            gradients = torch.autograd.grad(prompts, leaves, v, create_graph=True, allow_unused=True)
            sums = [
                (one * torch.randn(one.shape, generator=generator).to(one)).sum()
                for one in gradients
                if one is not None and one.requires_grad
            ]
            if not sums:
                return torch.zeros_like(prompts)
            found = torch.autograd.grad(
                torch.stack([one.double() for one in sums]).sum(), v, allow_unused=True
            )[0]
    except RuntimeError as error:
        raise UserError("what the prompts depend on cannot be differentiated twice") from error
    return torch.zeros_like(prompts) if found is None else found.detach()


def _same_for_all(values: Tensor) -> bool:
    """Derivatives (n, M, d) that are the same up to rounding."""
    size = values.abs().max()
    return bool((values - values[:1]).abs().max() <= 1e-5 * size)
