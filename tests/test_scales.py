"""The schedule says where every token lies, and refuses what is not a schedule."""

import pytest
import torch

from helpers.tiny import ODD_SCALES, SCALES
from var_exp.scales import ScaleSchedule, total_tokens

PUBLISHED = {
    680: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    2240: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
    9451: [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
    341: [1, 2, 4, 8, 16],
}
ALL = {"five": SCALES, **ODD_SCALES}


@pytest.mark.parametrize("seq_len", PUBLISHED)
def test_published_schedules_have_the_published_lengths(seq_len):
    schedule = ScaleSchedule(PUBLISHED[seq_len])
    assert schedule.seq_len == total_tokens(PUBLISHED[seq_len]) == seq_len
    assert schedule.num_scales == len(PUBLISHED[seq_len])


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
def test_slices_levels_and_split_agree_with_counting_token_by_token(patch_nums):
    schedule = ScaleSchedule(patch_nums)
    levels = []
    for k, (h, w) in enumerate(schedule.sizes):
        levels += [k] * h * w
    assert schedule.level_ids().tolist() == levels
    assert schedule.level_ids().dtype == torch.int64
    sequence = torch.arange(schedule.seq_len).unsqueeze(0)  # (1, L)
    parts = schedule.split(sequence)
    for k, (part, where) in enumerate(zip(parts, schedule.slices, strict=True)):
        assert part[0].tolist() == [i for i, level in enumerate(levels) if level == k]
        assert part[0].tolist() == list(range(where.start, where.stop))
        assert part.shape[1] == schedule.num_tokens[k]


def test_the_mask_of_the_paper_has_the_published_density():
    for seq_len, density in ((680, 0.62), (2240, 0.65)):
        levels = ScaleSchedule(PUBLISHED[seq_len]).level_ids()
        share = (levels[:, None] >= levels[None, :]).float().mean()
        assert abs(share - density) < 0.005


def test_split_takes_a_prefix_of_whole_scales_along_any_dimension():
    schedule = ScaleSchedule([1, 2, 3])
    assert [len(part) for part in schedule.split(torch.zeros(5), dim=0)] == [1, 4]
    assert [part.shape for part in schedule.split(torch.zeros(2, 3, 1), dim=-1)] == [(2, 3, 1)]
    assert schedule.split(torch.zeros(2, 0)) == []
    assert [schedule.num_scales_in(length) for length in (0, 1, 5, 14)] == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [2, 4, 6, 13, 15])
def test_a_prefix_that_ends_inside_a_scale_is_refused(length):
    with pytest.raises(ValueError, match=f"length of {length} ends inside a scale"):
        ScaleSchedule([1, 2, 3]).split(torch.zeros(1, length))


def test_pairs_are_height_and_width_and_the_plain_form_gives_the_schedule_back():
    schedule = ScaleSchedule([1, (2, 3), [4, 4], (4, 6)])
    assert schedule.sizes == ((1, 1), (2, 3), (4, 4), (4, 6))
    assert schedule.patch_nums == [1, [2, 3], 4, [4, 6]]
    assert schedule.names == ("1", "2x3", "4", "4x6")
    assert schedule.latent_size == (4, 6)
    assert ScaleSchedule(schedule.patch_nums) == schedule
    assert hash(ScaleSchedule(schedule.patch_nums)) == hash(schedule)
    assert schedule != ScaleSchedule([1, (2, 3), 4]) and schedule != [1, [2, 3], 4, [4, 6]]


@pytest.mark.parametrize(
    ("patch_nums", "message"),
    [
        ([], "at least one scale"),
        ([1, 2, 2], r"got \(2, 2\) after \(2, 2\)"),
        ([1, 3, 2], r"got \(2, 2\) after \(3, 3\)"),
        ([[1, 4], [2, 3]], r"got \(2, 3\) after \(1, 4\)"),
        ([0, 1], "got 0"),
        ([-1], "got -1"),
        ([1.0, 2.0], "got 1.0"),
        ([True, 2], "got True"),
        (["1", "2"], "got '1'"),
        ([1, [2, 3, 4]], r"got \[2, 3, 4\]"),
    ],
)
def test_what_is_not_a_growing_schedule_is_refused_with_the_value(patch_nums, message):
    with pytest.raises(ValueError, match=message) as error:
        ScaleSchedule(patch_nums)
    assert "scales.patch_nums" in str(error.value)
    with pytest.raises(ValueError, match=message):
        total_tokens(patch_nums)


def test_the_last_scale_must_be_the_latent_grid_of_the_image():
    ScaleSchedule([1, 2, 4]).check_image(32, stride=8)
    ScaleSchedule([[1, 2], [2, 4]]).check_image((16, 32), stride=8)
    for size, stride in ((32, 4), (33, 8), ((32, 64), 8)):
        with pytest.raises(ValueError, match=r"last scale \(4, 4\) must be image size / stride"):
            ScaleSchedule([1, 2, 4]).check_image(size, stride)
