"""Learning rates against PyTorch's schedulers, and the settings of the papers."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from fused_attn import create_model
from fused_attn.modules import ElementwiseAttention
from fused_attn.train import TrainConfig, TrainError
from fused_attn.train.optim import attention_factor, build_optimizers, learning_rate
from fused_attn.train.recipes import RECIPES

STEPS_PER_EPOCH = 7


def config(**changes):
    return TrainConfig(**{"model": "wrn_10_1", "dataset": "digits", "out": "out", "epochs": 10, "lr": 0.3, **changes})


def scheduled(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def ours(settings, steps):
    return [learning_rate(settings, step, STEPS_PER_EPOCH) for step in range(steps)]


def test_step_schedule_is_multi_step_lr():
    settings = config(schedule="step", milestones=(3, 5, 9), gamma=0.2)
    expected = scheduled(lambda o: MultiStepLR(o, [21, 35, 63], gamma=0.2), 70)
    assert ours(settings, 70) == pytest.approx(expected)


def test_cosine_schedule_is_cosine_annealing_lr():
    expected = scheduled(lambda o: CosineAnnealingLR(o, T_max=70), 70)
    assert ours(config(schedule="cosine"), 70) == pytest.approx(expected)


def test_warm_up_is_linear_and_cosine_follows_it():
    rates = ours(config(schedule="cosine", warmup_epochs=2.0), 70)
    assert rates[:14] == pytest.approx([0.3 * (step + 1) / 14 for step in range(14)])
    assert rates[14:] == pytest.approx(scheduled(lambda o: CosineAnnealingLR(o, T_max=56), 56))


def test_constant_schedule():
    assert set(ours(config(schedule="constant"), 70)) == {0.3}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizer_takes_every_setting(optimizer):
    settings = config(optimizer=optimizer, momentum=0.8, weight_decay=0.01)
    (built,) = build_optimizers(settings, torch.nn.Linear(2, 2)).values()
    group = built.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.01)
    if optimizer == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.8, True)
    else:
        assert type(built) is {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]


@pytest.mark.parametrize(
    ("changes", "kind", "rate"),
    [
        ({"attention_lr": 0.7}, torch.optim.SGD, 0.7),
        ({"attention_optimizer": "adam"}, torch.optim.Adam, 0.3),
        ({"attention_optimizer": "adamw"}, torch.optim.AdamW, 0.3),
        ({"optimizer": "adam", "attention_optimizer": "sgd", "attention_lr": 0.2}, torch.optim.SGD, 0.2),
    ],
)
def test_attention_has_an_optimizer_of_its_own(changes, kind, rate):
    model = create_model("attention_wise_a", in_chans=1, image_size=8)
    settings = config(**changes)
    optimizers = build_optimizers(settings, model)
    assert list(optimizers) == ["optimizer", "attention_optimizer"]
    rest, attention = (optimizer.param_groups[0] for optimizer in optimizers.values())
    expected = [p for m in model.modules() if isinstance(m, ElementwiseAttention) for p in m.parameters()]
    assert list(map(id, attention["params"])) == list(map(id, expected))
    assert {*map(id, rest["params"]), *map(id, expected)} == set(map(id, model.parameters()))
    assert len(rest["params"]) + len(expected) == len(list(model.parameters()))
    assert isinstance(optimizers["attention_optimizer"], kind)
    assert (rest["lr"], attention["lr"]) == (0.3, rate)
    assert attention_factor(settings) == pytest.approx(rate / 0.3)


@pytest.mark.parametrize(
    "name", ["sa_resnet20", "mrla_base_resnet50", "mrla_light_resnet50", "aa_wrn_10_1", "se_resnet34", "swin_tiny"]
)
def test_every_kind_of_attention_can_be_separate(name):
    with torch.device("meta"):
        model = create_model(name)
    assert set(build_optimizers(config(attention_lr=0.1), model)) == {"optimizer", "attention_optimizer"}


def test_attention_that_cannot_be_separate():
    with pytest.raises(
        TrainError, match=r"attention_lr: model wrn_10_1 must have parameters in attention .* got no param"
    ):
        build_optimizers(config(attention_lr=0.1), create_model("wrn_10_1"))
    with pytest.raises(TrainError, match=r"attention_optimizer: .* and others, got no others"):
        build_optimizers(config(attention_optimizer="sgd"), ElementwiseAttention(1, (2, 2), 1))
    with pytest.raises(TrainError, match="attention_lr must be above 0, got 0"):
        config(attention_lr=0)
    with pytest.raises(TrainError, match="mixed_precision must be no or bf16 with two optimizers, got 'fp16'"):
        config(attention_lr=0.1, mixed_precision="fp16")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds(name):
    settings = {"model": "wrn_28_10", "dataset": "cifar10", "out": "out", **RECIPES[name][1]}
    recipe = TrainConfig(**settings)
    with torch.device("meta"):
        model = create_model(recipe.model, **recipe.parsed_model_options())
    assert sum(parameter.numel() for parameter in model.parameters()) > 3e4


def test_recipes_hold_the_numbers_of_the_papers():
    wrn, resnet = RECIPES["replication-wrn"][1], RECIPES["replication-resnet34"][1]
    # 45,000 + 5,000 images; 60 epochs of SGD with Nesterov's momentum 0.9; 220 epochs of Adam.
    assert (wrn["validation"], wrn["epochs"], wrn["momentum"], wrn["nesterov"]) == (5000, 60, 0.9, True)
    assert (resnet["validation"], resnet["epochs"], resnet["optimizer"]) == (5000, 220, "adam")
    bello = RECIPES["aa-wrn"][1]
    assert bello["lr"] == pytest.approx(0.2 * bello["batch_size"] / 256)
    assert bello["warmup_epochs"] == pytest.approx(0.05 * bello["epochs"])
    assert bello["schedule"] == "cosine"


def test_recipe_of_sa_resnet():
    """64K steps of 128 images, divided by 10 at 32K and 48K steps, to the nearest end of an epoch of CIFAR-10."""
    recipe = TrainConfig(out="out", **RECIPES["sa-resnet"][1])
    steps_per_epoch = 50_000 // 128
    assert recipe.max_steps == 64_000 <= recipe.epochs * steps_per_epoch
    for step, before, after in ((32_000, 0.1, 0.01), (48_000, 0.01, 0.001)):
        assert learning_rate(recipe, step - steps_per_epoch, steps_per_epoch) == pytest.approx(before)
        assert learning_rate(recipe, step + steps_per_epoch, steps_per_epoch) == pytest.approx(after)
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, False, 1e-4)


def test_recipe_of_mrla():
    recipe = TrainConfig(out="out", **RECIPES["mrla"][1])
    rates = [learning_rate(recipe, 10 * epoch, 10) for epoch in (3, 29, 30, 60, 90)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])
    assert learning_rate(recipe, 0, 10) < learning_rate(recipe, 15, 10) < 0.1
    with torch.device("meta"):
        model = create_model(recipe.model, **recipe.parsed_model_options())
    assert model.stages[3][2].drop_path.p == 0.2


def test_recipes_of_attention_wise():
    """Section 2.3: Adam at PyTorch's defaults, 10 epochs, batches of 4096 and 1024."""
    fashion, cifar = (TrainConfig(out="out", **RECIPES[f"attention-wise{name}"][1]) for name in ("", "-cifar10"))
    assert (fashion.batch_size, cifar.batch_size) == (4096, 1024)
    assert (fashion.dataset, cifar.dataset) == ("fashion_mnist", "cifar10")
    for recipe in (fashion, cifar):
        assert (recipe.epochs, recipe.optimizer, recipe.lr, recipe.weight_decay) == (10, "adam", 1e-3, 0.0)
        assert {learning_rate(recipe, step, 14) for step in range(140)} == {1e-3}
        (adam,) = build_optimizers(recipe, torch.nn.Linear(1, 1)).values()
        assert adam.param_groups[0]["betas"] == (0.9, 0.999)


def test_recipe_of_result_attention():
    recipe = TrainConfig(out="out", **RECIPES["result-attention"][1])
    rates = [learning_rate(recipe, 10 * epoch, 10) for epoch in (1, 59, 60, 120, 160)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.004, 0.0008])
    assert learning_rate(recipe, 0, 10) < learning_rate(recipe, 5, 10) < 0.1
    assert (recipe.batch_size, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (128, 0.9, True, 5e-4)
    assert (recipe.crop_padding, recipe.flip, recipe.rotate, recipe.aux_weights) == (4, True, 15.0, (0.4, 0.4))


def test_momentum_of_zero_concerns_sgd_alone(tmp_path):
    settings = {"model": "sa_resnet20", "dataset": "synthetic", "out": tmp_path, "momentum": 0.0}
    assert TrainConfig(**settings, optimizer="adam", attention_lr=0.1).momentum == 0
    for optimizers in ({"optimizer": "sgd"}, {"optimizer": "adam", "attention_optimizer": "sgd"}):
        with pytest.raises(TrainError, match=r"momentum must be above 0 with nesterov, got 0\.0"):
            TrainConfig(**settings, **optimizers)


def test_recipes_of_swin():
    imagenet, cifar = (TrainConfig(out="out", **RECIPES[f"swin{name}"][1]) for name in ("", "-cifar10"))
    for recipe in (imagenet, cifar):
        assert (recipe.epochs, recipe.warmup_epochs, recipe.optimizer, recipe.weight_decay) == (300, 20, "adamw", 0.05)
        assert (recipe.label_smoothing, recipe.clip_norm, recipe.schedule) == (0.1, 5.0, "cosine")
    assert (imagenet.batch_size, imagenet.lr, imagenet.parsed_model_options()) == (1024, 1e-3, {"drop_path": 0.2})
    assert cifar.lr == pytest.approx(imagenet.lr * (cifar.batch_size / imagenet.batch_size) ** 0.5, rel=0.02)
