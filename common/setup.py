"""What a stage needs before its first line of learning: all rules about flags, the domain, the run, the models.

Whatever can be refused is refused here, with one line, before anything has been written.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gymnasium.vector import VectorEnv

import envs
from common import UserError, demos, options, ranks
from common.options import ScaleFlags, must
from common.runs import Run, load_state, newest_run, read_json, run_folder
from common.weights import add_lora, load_model, load_paligemma, load_unimodal, merge_lora
from envs.operator import Operator
from model import EFM, PRESETS, EFMConfig
from tokens import QUESTION_INSTRUCTION, Tokenizer


# --- parts --------------------------------------------------------------------------------------------------
def make_env(domain: str, num_envs: int, **kwargs: Any) -> VectorEnv:
    """`envs.make_vec`; an unknown domain or kind of observation is a UserError."""
    try:
        return envs.make_vec(domain, num_envs, **kwargs)
    except ValueError as e:
        raise UserError(e) from None


def load_checkpoint(path: Path, env: VectorEnv, beside: EFM | None = None) -> EFM:
    """`load_model` onto the device; a missing or damaged file, or one of another domain, is a UserError."""
    try:
        model = load_model(path, beside).to(ranks.device())
    except ValueError as e:
        raise UserError(e) from None
    needs = (env.size, ()) if env.obs == "images" else (0, env.state_names)
    reads = env.size if model.cfg.resize else model.cfg.image_size
    words = model.tokenizer.tokenizer.encode(" ".join(env.instructions()), add_special_tokens=False).tokens
    if (reads, model.cfg.state_names) != needs or "<unk>" in words:
        raise UserError(f"{path}: this model is not for --domain {env.name} --obs {env.obs}; name another run")
    return model


def adapt(model: EFM, rank: int, base: Path) -> EFM:
    """`add_lora`; without peft a UserError."""
    try:
        return add_lora(model, rank, base)
    except ValueError as e:
        raise UserError(e) from None


def learning_rate(update: int, updates: int, peak: float) -> float:
    """A cosine from `peak` to a tenth of it, scaled down linearly over the first 100 updates."""
    return peak * min(1.0, (update + 1) / 100) * (0.55 + 0.45 * math.cos(math.pi * update / updates))


def is_nano(model: str) -> bool:
    return model in PRESETS and PRESETS[model].width < 512


def check_scale(cfg: ScaleFlags) -> None:
    """Rules about devices, which hold in both stages."""
    options.check(cfg)
    ranks.choose_device(cfg.device)
    compiler = any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
    if cfg.compile and not compiler:
        raise UserError("--compile: needs a C++ compiler, and none is here; install g++ or leave it out")


def open_run(cfg: Any, env: VectorEnv, stage: str, weights: int, **more: Any) -> Run:
    """The run of a stage's configuration, in `cfg.out` or its usual folder; threads for so many weights are chosen."""
    folder = Path(cfg.out) if cfg.out else run_folder(env.name, env.obs, env.default_obs, stage, cfg.seed)
    alone = ranks.world() == 1  # several processes are not to have so many threads each
    if alone and cfg.resume and cfg.threads is None and (folder / "config.json").exists():
        cfg.threads = read_json(folder / "config.json").get("threads")
    ranks.choose_threads(cfg, weights)
    return Run(folder, cfg, **more)


def run_settings(folder: Path) -> dict:
    """config.json of a Stage 1 or Stage 2 run; other folders are a UserError."""
    settings = read_json(folder / "config.json")
    if not {"domain", "obs", "seed"} <= settings.keys():
        raise UserError(f"{folder}/config.json: not the configuration of a Stage 1 or Stage 2 run; name another run")
    return settings


def load_run(folder: Path, num_envs: int, policy: str = "policy") -> tuple[VectorEnv, EFM, EFM]:
    """The domain of a run, num_envs at once, its policy and its reward model. The folder is all that is needed."""
    settings = run_settings(folder)
    env = make_env(settings["domain"], num_envs, obs=settings["obs"])
    acting = load_checkpoint(folder / f"{policy}.safetensors", env)
    return env, acting, load_checkpoint(folder / "reward.safetensors", env, acting)


def measured_threshold(folder: Path, env: VectorEnv) -> float:
    """A run's s: its flag, or what Stage 1 has measured on held-out demonstrations, else the domain's."""
    for name in ("config.json", "summary.json"):
        if (folder / name).exists():
            s = read_json(folder / name).get("success_threshold")
            if s is not None:
                return s
    return env.success_threshold


# --- Stage 0 ------------------------------------------------------------------------------------------------
def all_texts(domains: list[VectorEnv]) -> list[str]:
    """Every instruction and every question of the domains."""
    texts = []
    for domain in domains:
        texts += [*domain.instructions(), *domain.questions()]
    return texts


def with_questions(flag: str, name: str) -> VectorEnv:
    """The domain, from images, that a flag of Stage 0 names; one that has no questions is a UserError."""
    try:
        domain = make_env(name, 1, obs="images")
    except UserError as e:
        raise UserError(str(e).replace("--domain", flag, 1)) from None
    has_questions = hasattr(domain, "scenes")
    must([(has_questions, f"{flag} {domain.name}: has no questions for Stage 0; choose pointmass or tabletop")])
    return domain


def stage0(cfg: Any) -> tuple[list[VectorEnv], Run, EFM | None]:
    """The domains, the run, and a model from scratch for a Stage 0 configuration; no model if the run is done."""
    options.check(cfg)
    ranks.choose_device(cfg.device)
    env = with_questions("--domain", cfg.domain)
    options.fill(cfg, {"model": env.stage1_defaults["images"]["model"]})
    if cfg.model not in PRESETS:
        raise UserError(f"--model {cfg.model}: unknown; choose one of {', '.join(PRESETS)}")
    also = [with_questions("--also", name) for name in cfg.also or ()]
    read_only = [with_questions("--words", name) for name in cfg.words or ()]
    for domain in also:
        must([((domain.size, domain.simultaneous) == (env.size, env.simultaneous),
               f"--also {domain.name}: its pictures are not like those of {env.name}; choose the same size and history"),
        ])  # fmt: skip
    domains = [env, *also]
    least = len(domains)
    must([(cfg.batch >= least, f"--batch {cfg.batch}: must be at least {least}, a question of each domain")])
    # a name that Stage 1 does not take for the newest Stage 0 run
    name = "unimodal-stage0" if cfg.unimodal else "stage0"
    run = open_run(cfg, env, name, 0 if is_nano(cfg.model) else ranks.SMALL, obs="images")
    if run.done:
        return domains, run, None
    torch.manual_seed(cfg.seed)
    texts = all_texts(domains + read_only)
    if any(domain.predicts_instruction for domain in domains):
        texts.append(QUESTION_INSTRUCTION)
    model = EFM(replace(PRESETS[cfg.model], image_size=env.size), Tokenizer.train(texts)).to(ranks.device())
    run.track(model=model)
    return domains, run, model


# --- Stage 1 ------------------------------------------------------------------------------------------------
# Up to so many demonstrations are turned where they can be. On the tabletop held-out losses then rise long before the policy
# and d get worse, and with more demonstrations turning only slows nano models down.
FEW = 1000


def stage1(cfg: Any) -> tuple[VectorEnv, Run, EFM | None]:
    """The domain, the run, and the model that a Stage 1 configuration starts from; no model if the run is done.

    Fields of the configuration that are None get the domain's defaults. Raises UserError with one line.
    """
    check_scale(cfg)
    pretrained = bool(cfg.weights or cfg.vit)
    env = make_env(cfg.domain, 1)
    cfg.obs = cfg.obs or ("images" if pretrained else env.default_obs)
    env = make_env(cfg.domain, 1, obs=cfg.obs)
    defaults = env.stage1_defaults[cfg.obs]
    usual = {"batch": 128, "lr": 1e-3}
    # a model that has seen the web needs no symmetries; and an average needs the memory of a second model
    average = 0.998 if cfg.lora_rank or not pretrained else 0.0
    options.fill(cfg, {"symmetries": not pretrained, "average": average})
    can_turn = cfg.symmetries and env.symmetries.turned() is not env.symmetries
    episodes = defaults["episodes"] if cfg.episodes is None else cfg.episodes
    if can_turn and not cfg.dataset and episodes * cfg.data_fraction <= FEW:
        options.fill(cfg, {"turns": True})
        if cfg.turns:
            options.fill(cfg, env.turned_defaults)
    options.fill(cfg, {"reward": "loss"})
    uses_domains_model = (cfg.model or defaults["model"]) == defaults["model"]
    # a domain's batch and learning rate are for its model
    options.fill(cfg, usual | defaults if uses_domains_model else defaults | usual)
    named = cfg.init not in (None, "none")
    least = 2 + env.predicts_instruction
    models = (*PRESETS, "paligemma")
    must([
        (cfg.model in models, f"--model {cfg.model}: unknown; choose one of {', '.join(models)}"),
        ((cfg.model == "paligemma") == bool(cfg.weights),
         "--model paligemma and --weights FOLDER_OR_HUB_ID go together: give both or neither"),
        (not (pretrained and cfg.obs == "state"), "--obs state: a pre-trained model reads images; leave it out"),
        (not (pretrained and named), f"--init {cfg.init}: the model starts from --weights or --vit; leave one out"),
        (can_turn or not cfg.turns,
         "--turns True: for pointmass and tabletop from states with --symmetries, so not for this run; leave it out"),
        (cfg.batch >= least, f"--batch {cfg.batch}: must be at least {least}"),
        (cfg.episodes >= 2, f"--episodes {cfg.episodes}: must be at least 2"),
    ])  # fmt: skip
    if not cfg.dataset:
        demos.split(cfg.episodes, cfg.data_fraction)  # its complaints, before anything is recorded
    init = None if pretrained else starting_run(cfg, env)
    cfg.init = str(init or "none")
    # adapters cannot make up for a random projection
    whole = not cfg.vit and (cfg.weights or init)
    needs = f"--lora-rank {cfg.lora_rank}: needs a model pre-trained as a whole; name --weights or --init alone"
    must([(whole or not cfg.lora_rank, needs)])
    run = open_run(cfg, env, "stage1", 0 if is_nano(cfg.model) else ranks.SMALL)
    if run.done:
        return env, run, None
    torch.manual_seed(cfg.seed)
    model = initial_model(cfg, env, init)
    if cfg.lora_rank:
        model = adapt(model, cfg.lora_rank, run.folder / "base.safetensors")
    run.track(model=model)
    return env, run, model


def starting_run(cfg: Any, env: VectorEnv) -> Path | None:
    """The run whose model Stage 1 starts from: --init, else for images the domain's newest Stage 0, if there is one."""
    if cfg.init == "none" or (cfg.init is None and cfg.obs == "state"):
        return None
    newest = newest_run(f"{cfg.domain}-images-stage0-s*") or newest_run(f"{cfg.domain}-stage0-s*")
    init = Path(cfg.init) if cfg.init else newest
    print(
        f"starting from {init}" if init else "starting from scratch: no Stage 0 run here (python stage0.py makes one)"
    )
    if init and (init / "config.json").exists():
        domain = read_json(init / "config.json").get("domain", cfg.domain)
        before = make_env(domain, 1, obs=cfg.obs)
        if before.simultaneous != env.simultaneous:  # the second image means something else
            raise UserError(f"--init {init}: its second image is not that of --domain {cfg.domain}; name another run")
    return init


def initial_model(cfg: Any, env: VectorEnv, init: Path | None) -> EFM:
    """From another run, from pre-trained weights or from scratch: the paper's PaLI, Uni-PaLI and Scratch variants."""
    if init:
        return merge_lora(load_checkpoint(init / "policy.safetensors", env))
    texts = [*env.instructions(), *env.state_names]
    if env.predicts_instruction:
        texts.append(QUESTION_INSTRUCTION)
    tokenizer = Tokenizer.train(texts)
    try:
        if cfg.vit:
            sizes = PRESETS.get(cfg.model, EFMConfig())
            return load_unimodal(cfg.vit, cfg.weights or "", sizes, tokenizer).to(ranks.device())
        if cfg.weights:
            return load_paligemma(cfg.weights).to(ranks.device())
    except ValueError as e:
        raise UserError(e) from None
    if cfg.obs == "images":
        sizes = replace(PRESETS[cfg.model], image_size=env.size)
    else:
        sizes = replace(PRESETS[cfg.model], state_names=env.state_names, state_dim=env.state_dim)
    return EFM(sizes, tokenizer).to(ranks.device())


# --- Stage 2 ------------------------------------------------------------------------------------------------
# what a domain that says nothing else in `stage2_defaults` takes
USUAL = {"gamma": 0.9, "temperature": 1.0, "clip_reward": 0.0, "success_bonus": 0.0, "batch": 64, "learns": "all",
         "num_envs": 128, "lr": 1e-4, "symmetries": False}  # fmt: skip
STATIONS = {"num_envs": 16}  # that an operator looks after


def stage1_run(cfg: Any) -> tuple[Path, dict]:
    """The run that --stage1 names, or the newest Stage 1 run, and its configuration; its seed is the default."""
    folder = Path(cfg.stage1) if cfg.stage1 else newest_run("*-stage1-s*")
    if folder is None:
        raise UserError("runs/: no finished Stage 1 run; run `python stage1.py` first or name a run with --stage1")
    settings = run_settings(folder)
    options.fill(cfg, {"seed": settings["seed"]})
    cfg.stage1 = str(folder)
    return folder, settings


def stage2(cfg: Any) -> tuple[VectorEnv, Run, EFM | None, EFM | None, torch.optim.Optimizer | None, Any]:
    """The domain, the run, policy, frozen reward model and the policy's optimiser of a Stage 2 configuration, and what
    to call for a forward pass with gradients (`ranks.scale`).

    None from the policy on if the run is done. Fields of the configuration that are None get the domain's defaults.
    Raises UserError.
    """
    check_scale(cfg)
    stage1, settings = stage1_run(cfg)
    options.fill(cfg, {"domain": settings["domain"]})
    obs = settings["obs"]
    env = make_env(cfg.domain, 1, obs=obs)
    reward_folder = Path(cfg.reward_run) if cfg.reward_run else stage1
    measured = {"success_threshold": measured_threshold(reward_folder, env)}
    # where Stage 1 turned nothing, practice does not; a run of an earlier version does not say
    unturned = {} if settings.get("symmetries") else {"symmetries": False}
    usual = USUAL | (STATIONS if cfg.operator else {}) | measured
    options.fill(cfg, usual | env.stage2_defaults[obs] | unturned)
    ranks.require_divisible(cfg, "batch", "num_envs")
    reward_settings = read_json(reward_folder / "config.json")
    of_domain = reward_settings.get("domain") in (settings["domain"], cfg.domain)
    moments = "--keep-optimizer: the moments are of all weights, not of the blocks'; leave it out or add --learns all"
    encoded = "--symmetries: of images practice keeps features, which none of them changes; leave it out"
    alone = "--operator: one operator looks after the stations of one process; leave torchrun out"
    must([
        (not (cfg.learns == "blocks" and cfg.keep_optimizer), moments),
        (not (cfg.symmetries and obs == "images"), encoded),
        (not (cfg.operator and ranks.world() > 1), alone),
        (not cfg.operator or hasattr(env, "ask"),
         f"--operator: {cfg.domain} cannot go on without a reset; practise on tabletop or bananatable"),
        (of_domain and reward_settings.get("obs") == obs,
         f"--reward-run {reward_folder}: not a Stage 1 run of --domain {cfg.domain} --obs {obs}; name another"),
    ])  # fmt: skip
    require_alike(env, make_env(settings["domain"], 1, obs=obs))
    env = make_env(cfg.domain, cfg.num_envs // ranks.world(), obs=obs)
    if cfg.operator:
        env = Operator(env, cfg.seed)
    policy = load_checkpoint(stage1 / "policy.safetensors", env)
    reward_model = load_checkpoint(reward_folder / "reward.safetensors", env, policy)
    reward_model.requires_grad_(False)
    new_adapters = cfg.lora_rank > policy.lora_rank  # on weights that Stage 1 has trained
    of_weights = "--keep-optimizer: the moments are of Stage 1's weights, not of --lora-rank's; leave one of them out"
    must([
        (not cfg.lora_rank or policy.lora_rank in (0, cfg.lora_rank),
         f"--lora-rank {cfg.lora_rank}: {stage1} has adapters of rank {policy.lora_rank}; leave it out"),
        (not (new_adapters and cfg.keep_optimizer), of_weights),
    ])  # fmt: skip
    cfg.lora_rank = cfg.lora_rank or policy.lora_rank
    weights = sum(p.numel() for p in policy.parameters())
    run = open_run(cfg, env, "stage2", weights, obs=obs, model=settings.get("model"))
    if run.done:
        return env, run, None, None, None, None
    if cfg.learns == "blocks":  # the others' gradient is hardly more than noise, and AdamW steps as far along noise
        for name, p in policy.named_parameters():
            p.requires_grad_(p.requires_grad and ".layers." in name)
    if new_adapters:
        torch.manual_seed(cfg.seed)
        policy = adapt(policy, cfg.lora_rank, stage1 / "policy.safetensors")
    run.track(policy=policy)
    learnt = [name for name, p in policy.named_parameters() if p.requires_grad]
    if policy.cfg.image_size:  # frozen, as it is fed its features; AdamW skips it
        policy.vision_tower.requires_grad_(False)
    shard = settings.get("model") == "paligemma" and not cfg.lora_rank
    wrapped = ranks.scale(policy, cfg, shard, judge=reward_model)
    optimizer = torch.optim.AdamW([policy.get_parameter(name) for name in learnt], lr=cfg.lr, weight_decay=0.0)
    if cfg.keep_optimizer and not run.resumed:
        load_moments(optimizer, stage1)
    return env, run, policy, reward_model, optimizer, wrapped


def simulations(env: VectorEnv, n: int) -> VectorEnv:
    """The domain with n simulations, made once for each n; an operator's stations are as many as they are."""
    if isinstance(env, Operator) or n == env.num_envs:
        return env
    made = vars(env).setdefault("of_other_sizes", {})
    if n not in made:
        made[n] = make_env(env.name, n, obs=env.obs)
    return made[n]


def baseline(cfg: Any, domains: tuple[str, ...], name: str) -> tuple[list, Run, EFM | None, EFM | None, Any]:
    """For a neighbour's method: its domains, cfg.num_envs simulations each, the run, Stage 1's policy and reward model
    and its demonstrations, learnt from and held out; no models if the run is done. Raises UserError."""
    check_scale(cfg)
    stage1, settings = stage1_run(cfg)
    taught_here = {"episodes", "dataset", "data_fraction"} <= settings.keys()
    must([
        (domains, "--tasks: name at least one domain"),
        (taught_here, f"--stage1 {stage1}: has no demonstrations of its own; name a Stage 1 run"),
        (settings["obs"] == "state", f"--stage1 {stage1}: reads images, the baselines only states; name another"),
        (not (cfg.lora_rank or cfg.bf16 or cfg.checkpointing or cfg.compile),
         "--lora-rank, --bf16, --checkpointing, --compile: for stage1.py and stage2.py alone; leave them out"),
    ])  # fmt: skip
    made = [make_env(domain, cfg.num_envs, obs=settings["obs"]) for domain in domains]
    taught = make_env(settings["domain"], 1, obs=settings["obs"])
    for env in made:
        require_alike(env, taught, f"--stage1 {stage1}: is of {taught.name}, the task of {env.name}; name another")
    policy = load_checkpoint(stage1 / "policy.safetensors", taught)
    must([(not policy.lora_rank, f"--stage1 {stage1}: has LoRA adapters, which no baseline trains; name another")])
    weights = sum(p.numel() for p in policy.parameters())
    run = open_run(cfg, made[0], name, weights, obs=settings["obs"], domain=domains[0])
    if run.done:
        return made, run, None, None, (None, None)
    reward_model = load_checkpoint(stage1 / "reward.safetensors", taught).requires_grad_(False)
    data = demos.load(SimpleNamespace(**settings | {"symmetries": False}), taught)
    return made, run, policy, reward_model, data


def require_alike(env: VectorEnv, taught: VectorEnv, complaint: str = "") -> None:
    """Raise UserError unless a model taught in one domain can practise in the other: same tokens, same
    horizon, and from states the same observations; frames of other things are frames."""
    alike = ["action_tokens", "steps_cap", "steps_bins", "simultaneous", "horizon"]
    if env.obs == "state":
        alike += ["state_names", "state_dim"]
    if any(getattr(env, k) != getattr(taught, k) for k in alike):
        of_domain = f"--domain {env.name}: its actions or observations are not those of {taught.name}; leave it out"
        raise UserError(complaint or of_domain)


def load_moments(optimizer: torch.optim.Optimizer, run: Path) -> None:
    """Give the optimiser another run's last AdamW moments, and not its learning rate."""
    moments = load_state(run / "resume.pt")["optimizer"]["state"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, each in moments.items():
        if i >= len(parameters) or each["exp_avg"].shape != parameters[i].shape:
            raise UserError(f"--keep-optimizer: the moments of {run} are of other weights; leave it out")
    ranks.load_optimizer(optimizer, {"state": moments})
