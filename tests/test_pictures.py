"""Pictures show what they say: the last frame is the episode's last, lines are the numbers, letters can be read."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from common import pictures
from common.pictures import WIDTH, Film

LENGTH = np.array([3, 5, 2, 4, 5, 1, 2, 3])


@pytest.fixture
def film() -> Film:
    """Eight episodes whose frames tell their episode (red) and time (green), all of them frozen at their end."""
    frames = np.zeros((8, 6, 20, 30, 3), np.uint8)
    tracks = np.zeros((8, 6, 2))
    for i, end in enumerate(LENGTH):
        for t in range(6):
            frames[i, t, ..., :2] = 10 * i, 10 * min(t, end)
            tracks[i, t] = 0.1 * i, 0.1 * min(t, end)
    reached = np.array([True, False, True, True, True, False, True, True])
    d = np.maximum(0, LENGTH[:, None] - np.arange(6.0))
    return Film(
        frames,
        tracks,
        [f"push block {i} to block {i + 1} along the table" for i in range(8)],
        LENGTH,
        reached,
        d,
    )


def test_trajectories_show_the_first_and_the_last_frame(film):
    axes = np.array(pictures.trajectories(film).axes).reshape(4, 4)
    for i, end in enumerate(LENGTH):
        first, last = axes[i // 4 * 2, i % 4], axes[i // 4 * 2 + 1, i % 4]
        np.testing.assert_array_equal(first.images[0].get_array(), film.frames[i, 0])
        np.testing.assert_array_equal(last.images[0].get_array(), film.frames[i, end])
        assert f"block {i} to" in first.get_title().replace("\n", " ")
        assert last.get_title() == ("reached in" if film.reached[i] else "NOT reached,") + f" {end} steps"
        way = last.lines[0]
        np.testing.assert_allclose(way.get_xydata(), film.tracks[i, : end + 1] * (30, 20))
        assert way.get_color() == "white" and way.get_path_effects()  # with a rim: to be seen on any ground
    pictures.close()


def test_steps_to_go_is_of_the_longest_success(film):
    axes = pictures.steps_to_go(film, 0.5).axes
    plot = next(ax for ax in axes if ax.get_xlabel())
    d = next(line for line in plot.lines if line.get_label().startswith("d(o, g)"))
    np.testing.assert_allclose(d.get_ydata(), film.d[4])  # 5 steps; episode 1 has 5, too, and fails
    assert film.goals[4] in plot.get_title()
    (s,) = [line for line in plot.lines if "s = 0.5" in line.get_label()]
    assert set(s.get_ydata()) == {0.5}
    pictures.close()


def test_a_film_that_has_ended_stands_still(film, tmp_path):
    pictures.save_gif([film.part(3), film.part(3)], tmp_path / "film.gif", fps=2)
    gif = Image.open(tmp_path / "film.gif")
    assert gif.size == (90, 40)  # three side by side, two films
    assert gif.info["duration"] == 500
    gif.seek(gif.n_frames - 1)
    last = np.asarray(gif.convert("RGB")).reshape(2, 20, 3, 30, 3)[0, 10, :, 15]
    np.testing.assert_allclose(last, film.frames[range(3), LENGTH[:3], 10, 15], atol=2)


def test_curves_are_the_logged_numbers(tmp_path):
    names = ["env_steps", "true_at_end", "detected", "mean_steps", "return_mean", "return_std", "entropy"]
    rows = np.random.default_rng(0).random((4, len(names)))
    with open(tmp_path / "metrics.csv", "w", newline="") as f:
        csv.writer(f).writerows([names, *rows.tolist()])
    fig = pictures.curves(tmp_path / "metrics.csv")
    drawn = [line for ax in fig.axes for line in ax.lines]
    assert len(drawn) == 6
    for line, key in zip(drawn, names[1:], strict=True):
        np.testing.assert_allclose(line.get_ydata(), rows[:, names.index(key)])
    pictures.close()


@pytest.mark.parametrize("draw", [pictures.trajectories, lambda film: pictures.steps_to_go(film, 1.0)])
def test_letters_can_be_read_at_830_pixels(film, draw):
    fig = draw(film)
    texts = [text for ax in fig.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label) if text.get_text()]
    assert texts and fig.get_size_inches()[0] == WIDTH
    assert min(text.get_fontsize() for text in texts) >= 8  # 8 points at 100 pixels an inch: 11 pixels
    pictures.close()
