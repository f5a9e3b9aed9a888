"""Behind the hook: the quick tail is the network's, sparse sums are dense ones, and no SAE of another model or layer gets through."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_TEXT, TINY_VISION

from patchsae_utils import interventions
from patchsae_utils.adaptation import MaPLe, VisualPrompt
from patchsae_utils.clip.model import ClipModel
from patchsae_utils.data import templates_for
from patchsae_utils.interventions.tail import network_tail


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tail_equals_finish(depth, tiny_clip, tiny_images):
    """The one-query tail, also of a model whose last block has prompts of its own, and the whole network where it does not hold."""
    for clip in (tiny_clip, MaPLe(tiny_clip, 2, depth), VisualPrompt(tiny_clip, 3, depth)):
        for layer in (-2, -3):
            sample = clip.run_to(tiny_images, layer)
            tail = network_tail(clip, layer, sample)
            assert tail.__name__ == ("class_token_alone" if layer == -2 else "whole")
            noise = torch.randn(sample.tokens.shape, generator=torch.Generator().manual_seed(0))
            edited = sample._replace(tokens=sample.tokens + 0.3 * noise)
            with torch.no_grad():
                torch.testing.assert_close(tail(edited), clip.finish(edited, layer), rtol=1e-4, atol=1e-5)


def test_faults_c4_an_attentional_pool_reads_all_tokens(tiny_clip, sae, tiny_dataset, tiny_inputs):
    """FAULTS C4: open_clip's CoCa (``coca_ViT-B-32``) ended in a RuntimeError; now its whole network runs."""
    vision = TINY_VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 9, "output_tokens": True}
    text = TINY_TEXT | {"embed_cls": True, "output_tokens": True}
    multimodal = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CoCa(embed_dim=16, vision_cfg=vision, text_cfg=text, multimodal_cfg=multimodal)
    coca = ClipModel(model, preprocess=tiny_clip.preprocess, tokenizer=None, name="coca")
    head = F.normalize(torch.randn(len(tiny_dataset.class_names), coca.d_embed, generator=torch.Generator().manual_seed(0)), dim=1)
    table = interventions.sweep_masks(coca, sae, tiny_dataset, [3], "random", head=head, keep_error=True)
    expected = coca.logits(coca.encode_image(tiny_inputs), head).gather(1, tiny_dataset.labels[:, None]).mean()
    assert table["logit"][0] == pytest.approx(float(expected), abs=1e-4)
    assert network_tail(coca, -2, coca.run_to(tiny_inputs[:2], -2)).__name__ == "whole"


def test_trap_12_the_head_is_renormalised_after_averaging_templates(tiny_clip, tiny_dataset, head):
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)), rtol=0, atol=1e-5)
    with torch.no_grad():
        prompts = tiny_clip.encode_text([t.format(tiny_dataset.class_names[5]) for t in templates_for(tiny_dataset.spec)])
    prompts = F.normalize(prompts, dim=-1)
    assert prompts.mean(0).norm() < 1 - 1e-4  # so that forgetting it would show
    torch.testing.assert_close(head[5], F.normalize(prompts.mean(0), dim=0), rtol=0, atol=1e-5)
