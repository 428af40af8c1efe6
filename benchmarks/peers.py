"""Decoders to compare: this library's and others', each prepared for a scene and then run once per seed.

A decoder is a function of a ``Scene`` that returns ``run(seed)``; what it builds first is not timed. To
compare one more policy, add a line to ``LEARNING``.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from timing import readers, reading
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import nab
from nab.backends.assisted import Candidates
from nab.backends.hf import Speculative
from nab.backends.members import Members
from nab.backends.stack import stacked
from nab.backends.torch import CausalLM, Warper
from nab.selector import argmax
from nab.wrappers import seldom

FLASHSPEC = "flashspec"
INSTALL = f"pip install --no-deps {FLASHSPEC}==0.3.1, and pydantic"


class Answer(NamedTuple):
    """What a run emitted, in how many rounds, and the seconds of ``nab.decode.Seconds`` if it knows them."""

    tokens: list[int]
    rounds: int
    phases: tuple[float, ...] | None = None


class Scene(NamedTuple):
    """Models and a prompt; ``temperature`` 0 is greedy. Nothing stops an answer before ``new_tokens``."""

    target: PreTrainedModel
    drafters: Sequence[PreTrainedModel]
    prompt: list[int]
    new_tokens: int
    draft_len: int
    temperature: float


Run = Callable[[int], Answer]
Decoder = Callable[[Scene], Run]


def random_llama(shape: dict[str, Any], eps: float, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama made in place, seed 0, whose layers behind the first write ``eps`` times what they would.

    So ``early_exit(target, 1)`` agrees with it always at ``eps`` 0, seldom at .15.
    """
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            ends = {"bos_token_id": None, "eos_token_id": None}
            model = LlamaForCausalLM(LlamaConfig(**{"initializer_range": 0.05, **ends, **shape}))
    finally:
        torch.set_default_dtype(usual)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= eps
            layer.mlp.down_proj.weight *= eps
    return model.eval()


def tiny_target(eps: float, dtype: torch.dtype) -> PreTrainedModel:
    """``random_llama`` of hidden size 256, drawn in float32."""
    shape = {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
    }
    return random_llama(shape, eps, torch.float32, "cpu").to(dtype)


def perturbed(
    model: PreTrainedModel, amount: float, seed: int, shared: Sequence[torch.Tensor] = ()
) -> PreTrainedModel:
    """A copy whose weights have noise of ``amount`` times their standard deviation.

    Those ``shared`` are the model's own, without noise.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    kept = {id(weight): weight for weight in shared}
    made = copy.deepcopy(model, dict(kept))
    with torch.no_grad():
        for weight in made.parameters():
            if id(weight) not in kept:
                noise = torch.empty_like(weight).normal_(generator=generator)
                weight.add_(amount * weight.std(correction=0) * noise)
    return made


def random_prompt(vocab: int, length: int = 64, seed: int = 0) -> list[int]:
    """Uniform tokens."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _generated(scene: Scene, generate: Any = None, **extra: Any) -> Run:
    """``generate`` of transformers; ``rounds`` is left at the number of tokens."""
    generate = generate or scene.target.generate
    ids = torch.tensor([scene.prompt], device=scene.target.device)
    sampled = {"do_sample": True, "temperature": scene.temperature, "top_k": 0, "top_p": 1.0}
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": scene.new_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
        **(sampled if scene.temperature else {"do_sample": False}),
        **extra,
    }
    scene.target.generation_config.eos_token_id = None

    def run(seed: int) -> Answer:
        torch.manual_seed(seed)
        tokens = generate(ids, **options)[0, ids.shape[1] :].tolist()
        return Answer(tokens, len(tokens))

    return run


def plain(scene: Scene) -> Run:
    """Transformers, one token a forward."""
    return _generated(scene)


def assisted(scene: Scene) -> Run:
    """Transformers' assisted generation, made to draft ``draft_len`` tokens in every round.

    The number of tokens, their schedule and the confidence that ends a draft are read from the drafter's
    generation config alone. Its rounds are the target's forwards, which the caller counts.
    """
    (drafter,) = scene.drafters
    config = drafter.generation_config
    config.num_assistant_tokens = scene.draft_len
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    config.eos_token_id = None
    run = _generated(scene, assistant_model=drafter)
    return lambda seed: run(seed)._replace(rounds=0)


def hooked(scene: Scene) -> Run:
    """``generate`` with ``nab.backends.hf.Speculative``, under the objective that it has by default."""
    hook = Speculative(scene.drafters, draft_len=scene.draft_len)
    _watched(hook._members, scene)
    run = _generated(scene, custom_generate=hook)
    return lambda seed: run(seed)._replace(rounds=len(hook.queries[0].rounds))


def candidates(scene: Scene) -> Run:
    """Assisted generation with drafts of ``nab.backends.assisted.Candidates``, likewise."""
    hook = Candidates(scene.drafters, draft_len=scene.draft_len)
    _watched(hook._members, scene)
    run = _generated(scene, generate=partial(hook.generate, scene.target))
    return lambda seed: run(seed)._replace(rounds=len(hook.query.rounds))


def _watched(members: Members, scene: Scene) -> None:
    """Have a hook's readers of watched models watched, as ``reading`` does."""

    def made() -> list[CausalLM]:
        target, drafters = members.of(scene.target, scene.target.generation_config)
        return [target, *drafters.values()]

    readers([scene.target, *scene.drafters], made)


def flashspec(scene: Scene) -> Run:
    """The package of that name: one arm, so no choice; its eager batch-1 loop."""
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine.hf_drafter import HuggingFaceDrafter
    from flashspec.engine.verifier import TargetModel

    logging.getLogger(FLASHSPEC).setLevel(logging.ERROR)  # it warns that one arm leaves no choice
    (drafter,) = scene.drafters
    device, dtype = scene.target.device, scene.target.dtype
    config = FlashSpecConfig(
        device=str(device),
        drafter_strategy="bandit",
        compile=False,
        bandit=BanditConfig(n_arms=1),
        sampling=SamplingConfig(gamma=scene.draft_len, temperature=scene.temperature),
    )
    engine = SpeculativeEngine(
        config,
        [HuggingFaceDrafter("drafter", device, dtype, scene.temperature, model=drafter)],
        TargetModel("target", device, dtype, model=scene.target),
    )
    ids = torch.tensor([scene.prompt], device=device)

    @torch.inference_mode()
    def run(seed: int) -> Answer:
        torch.manual_seed(seed)
        result = engine.generate(ids, max_new_tokens=scene.new_tokens)
        return Answer(result.output_ids[0].tolist(), len(result.arm_steps))

    return run


def bare(scene: Scene) -> Run:
    """A plain loop over models with caches that are cropped: the floor of what PyTorch's loop costs.

    The first drafter drafts. Where there are others, all are scored in every round, and nothing is learned.
    """
    drafter, *others = scene.drafters
    k, device = scene.draft_len, scene.target.device
    verdict = _greedy_verdict if scene.temperature == 0 else _sampled_verdict

    @torch.inference_mode()
    def run(seed: int) -> Answer:
        torch.manual_seed(seed)
        tokens, rounds = list(scene.prompt), 0
        target_cache, drafter_cache, *caches = (DynamicCache() for _ in (scene.target, *scene.drafters))
        prompt = torch.tensor([tokens[:-1]], device=device)
        scene.target(input_ids=prompt, past_key_values=target_cache, use_cache=True, logits_to_keep=1)
        while len(tokens) < len(scene.prompt) + scene.new_tokens:
            unread = tokens[drafter_cache.get_seq_length() :]
            draft, q = _drafted(drafter, drafter_cache, unread, k, scene.temperature)
            read = torch.cat([torch.tensor(tokens[-1:], device=device), draft])
            logits = scene.target(
                input_ids=read[None], past_key_values=target_cache, use_cache=True, logits_to_keep=k + 1
            ).logits[0]
            accepted, *emitted = verdict(logits, draft, q, scene.temperature)
            tokens += emitted
            rounds += 1
            # both forget what was rejected; the drafter has not read its own last token
            if accepted < k:
                target_cache.crop(accepted - k)
            if accepted < k - 1:
                drafter_cache.crop(accepted - k + 1)
            if others:
                drafter_cache.crop(len(tokens) - accepted - 2 - drafter_cache.get_seq_length())  # read again
                for model, cache in zip(scene.drafters, (drafter_cache, *caches), strict=True):
                    _scored(model, cache, tokens[:-1], logits[: accepted + 1], scene.temperature)
        return Answer(tokens[len(scene.prompt) :][: scene.new_tokens], rounds)

    return run


def _scored(
    model: PreTrainedModel, cache: DynamicCache, read: list[int], logits: torch.Tensor, temperature: float
) -> list[float]:
    """Acceptance probabilities at the last positions behind ``read``, from the target's logits there."""
    fed = torch.tensor([read[cache.get_seq_length() :]], device=model.device)
    found = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=len(logits)).logits[0]
    if temperature == 0:
        return (found.argmax(-1) == logits.argmax(-1)).tolist()
    p, q = ((each / temperature).softmax(-1) for each in (logits, found))
    return torch.minimum(p, q).sum(-1).tolist()


def _drafted(
    model: PreTrainedModel, cache: DynamicCache, unread: list[int], k: int, temperature: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``k`` tokens ``(k,)`` and, when sampled, the laws they were drawn from."""
    fed, draft, laws = torch.tensor(unread, device=model.device), [], []
    for _ in range(k):
        logits = model(input_ids=fed[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            0, -1
        ]
        if temperature == 0:
            fed = logits.argmax(-1, keepdim=True)
        else:
            laws.append((logits / temperature).softmax(-1))
            fed = laws[-1].multinomial(1)
        draft.append(fed)
    return torch.cat(draft), laws


def _greedy_verdict(logits: torch.Tensor, draft: torch.Tensor, q: Any, temperature: float) -> list[int]:
    """Number accepted, then the tokens emitted; one read of the device."""
    best = logits.argmax(-1)
    accepted = (best[:-1] == draft).cumprod(0).sum(0, keepdim=True)
    count, *tokens = torch.cat([accepted, best]).tolist()
    return [count, *tokens[: count + 1]]


def _sampled_verdict(
    logits: torch.Tensor, draft: torch.Tensor, q: list[torch.Tensor], temperature: float
) -> list[int]:
    """Likewise: rejection sampling; the residual behind the last accepted token, or the bonus token."""
    laws, p = torch.stack(q), (logits / temperature).softmax(-1)
    at = draft[:, None]
    ratio = (p[:-1].gather(1, at) / laws.gather(1, at))[:, 0]
    accepted = (torch.rand_like(ratio) < ratio).cumprod(0).sum(0, keepdim=True)
    rest = torch.cat([(p[:-1] - laws).clamp_(min=0), p[-1:]])[accepted][0]
    last = rest.multinomial(1)
    count, final, *tokens = torch.cat([accepted, last, draft]).tolist()
    return [count, *tokens[:count], final]


Policy = Callable[[int, int], Any]
"""A fresh selector from the number of drafters and a seed."""


def timed(n: int, seed: int) -> Any:
    """The time objective as ``nab run`` has it, for drafts of 5 tokens."""
    objective, hedge = nab.Time(5), nab.NormalHedge()
    return seldom(nab.Selector(hedge, n, objective=objective, pick=argmax, rng=seed))


LEARNING: dict[str, Policy] = {
    "normal-hedge": lambda n, seed: nab.Selector(nab.NormalHedge(), n, rng=seed),
    "lazy": lambda n, seed: nab.Lazy(nab.Selector(nab.NormalHedge(), n, rng=seed), every=8),
    "time": timed,
}

POLICIES: dict[str, Policy] = {
    "constant": lambda n, seed: nab.Constant([1.0] + [0.0] * (n - 1)),
    "uniform": lambda n, seed: nab.Constant([1 / n] * n, rng=seed),
    **LEARNING,
}


def ours(policy: str, *, stack: bool = True) -> Decoder:
    """``nab.decode`` of transformers models under a policy; drafters are stacked, or read one by one."""

    def prepared(scene: Scene) -> Run:
        warper = Warper(scene.temperature)
        target, *drafters = (reading(model, warper) for model in (scene.target, *scene.drafters))
        if stack:
            stacked(drafters)
        return decoding(target, drafters, POLICIES[policy], scene)

    return prepared


def decoding(target: CausalLM, drafters: Sequence[Any], policy: Policy, scene: Scene) -> Run:
    """``nab.decode`` of models that are ready; all caches are empty at first."""

    def run(seed: int) -> Answer:
        for model in (target, *drafters):
            if hasattr(model, "reset"):
                model.reset()
        chooser = policy(len(drafters), seed)
        rounds = nab.decode(target, drafters, chooser, scene.prompt, draft_len=scene.draft_len, rng=seed)
        kept = list(nab.until(rounds, max_new_tokens=scene.new_tokens))
        phases = tuple(map(sum, zip(*(round_.seconds for round_ in kept), strict=True)))
        return Answer([token for round_ in kept for token in round_.emitted], len(kept), phases)

    return run


def decoders() -> dict[str, Decoder]:
    """Everything there is for one drafter, by name; ``flashspec`` where it is installed."""
    found: dict[str, Decoder] = {"plain": plain, "assisted": assisted}
    if find_spec(FLASHSPEC):
        found[FLASHSPEC] = flashspec
    return {
        **found,
        "bare loop": bare,
        **{f"nab {name}": ours(name) for name in ("constant", *LEARNING)},
        "nab in generate": hooked,
        "nab in assisted": candidates,
    }
