"""``attn_implementation="fused_attn"``: at construction, from files and afterwards, or an error that says why."""

import sys

import pytest
import torch
from equality import randomise

from fused_attn import integrations

FUSED = "fused_attn"
METHODS = ["get_correct_attn_implementation", "post_init", "set_attn_implementation", "_can_set_attn_implementation"]


@pytest.fixture
def registered(transformers, monkeypatch):
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
    from transformers.models.sam import modeling_sam

    for name in METHODS:
        monkeypatch.setattr(PreTrainedModel, name, PreTrainedModel.__dict__[name])
    for owner in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(owner, "_global_mapping", {**owner._global_mapping})
    monkeypatch.setattr(modeling_sam, "SAM_VISION_ATTENTION_CLASSES", {**modeling_sam.SAM_VISION_ATTENTION_CLASSES})
    integrations.transformers.register()
    return transformers


def sam_config(transformers, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    sizes |= {"window_size": 3, "global_attn_indexes": [1], "mlp_dim": 16, "output_channels": 32}
    return transformers.SamVisionConfig(**sizes, **options)


def swin_config(transformers, **options):
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": 4}
    return transformers.SwinConfig(**sizes, **options)


def fused(model):
    return integrations.convert(model, ops=()).fused


MODELS = {"SamVisionModel": sam_config, "SwinModel": swin_config}


@pytest.mark.parametrize("name", MODELS)
def test_at_construction(registered, name):
    kind, config = getattr(registered, name), MODELS[name](registered, attn_implementation="eager")
    plain = randomise(kind(config)).eval()
    model = kind(MODELS[name](registered, attn_implementation=FUSED)).eval()
    assert (fused(model), fused(plain)) == (2, 0)
    model.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, config.image_size, config.image_size)
    torch.testing.assert_close(model(images).last_hidden_state, plain(images).last_hidden_state, rtol=1e-4, atol=1e-4)
    weights, others = (each(images, output_attentions=True).attentions for each in (model, plain))
    assert len(weights) == len(others) > 0
    for found, expected in zip(weights, others, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_from_files(registered, name, tmp_path):
    kind = getattr(registered, name)
    kind(MODELS[name](registered)).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, attn_implementation=FUSED)
    assert model.config._attn_implementation == FUSED
    assert fused(model) == 2
    assert fused(registered.AutoModel.from_config(MODELS[name](registered), attn_implementation=FUSED)) == 2
    assert fused(kind.from_pretrained(tmp_path)) == 0


@pytest.mark.parametrize("name", MODELS)
def test_afterwards_and_back(registered, name):
    model = getattr(registered, name)(MODELS[name](registered, attn_implementation="eager"))
    model.set_attn_implementation(FUSED)
    assert (model.config._attn_implementation, fused(model)) == (FUSED, 2)
    model.set_attn_implementation(FUSED)
    assert fused(model) == 2
    model.set_attn_implementation("eager")
    assert (model.config._attn_implementation, fused(model)) == ("eager", 0)


def test_a_model_of_several_parts(registered):
    """SAM with its mask decoder, whose attention runs SDPA."""
    config = registered.SamConfig(
        vision_config=sam_config(registered, num_pos_feats=16),
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32, "num_attention_heads": 4},
    )
    plain = registered.SamModel(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "input_points": torch.tensor([[[[20.0, 30.0]]]])}
    expected = plain(**inputs).pred_masks
    plain.set_attn_implementation(FUSED)
    assert fused(plain) == 2
    torch.testing.assert_close(plain(**inputs).pred_masks, expected, rtol=1e-4, atol=1e-4)
    plain.set_attn_implementation({"vision_config": "sdpa"})
    assert fused(plain) == 0


def test_vitdet_which_has_no_interface(registered):
    config = registered.VitDetConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
        use_relative_position_embeddings=True,
    )  # fmt: skip
    model = registered.VitDetModel(config)
    model.set_attn_implementation(FUSED)
    assert fused(model) == 1
    config.use_relative_position_embeddings = False
    plain = registered.VitDetModel(config := registered.VitDetConfig(**{**config.to_dict()}))
    with pytest.raises(ValueError, match=r"1 of 1 candidates cannot be replaced: .*plain attention"):
        plain.set_attn_implementation(FUSED)
    assert plain.config._attn_implementation != FUSED
    config._attn_implementation = FUSED
    with pytest.raises(ValueError, match="plain attention"):
        registered.VitDetModel(config)


def test_models_without_such_attention_are_refused(registered):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = registered.ViTConfig(**sizes, image_size=32, patch_size=16)
    model = registered.ViTModel(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"must be asked for models whose attention it computes, got ViTModel"):
        model.set_attn_implementation(FUSED)
    assert model.config._attn_implementation == before
    config._attn_implementation = FUSED
    with pytest.raises(ValueError, match=r"got ViTModel"):
        registered.ViTModel(config)


def test_a_second_call_changes_nothing(registered):
    from transformers.modeling_utils import PreTrainedModel

    before = PreTrainedModel.post_init
    integrations.transformers.register()
    assert PreTrainedModel.post_init is before


def test_an_unknown_version_is_refused(transformers, monkeypatch):
    # which auto_docstring imports a second time
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"^register needs transformers from 5.24 to below 6, found 4.57.1$"):
        integrations.transformers.register()
