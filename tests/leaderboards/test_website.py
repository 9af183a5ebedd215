"""The site, in a real headless Chromium: sort, filter, open a run; no error, no request, nothing executed from records."""

import re
import shutil
import time
from pathlib import Path

import pytest

from harness.cli.main import main
from leaderboards import records, website
from tests.leaderboards.made import called, write_run

HOSTILE = [
    '<script>alert("x")</script>',
    "=HYPERLINK(1)",
    "../../x",
    "<img src=x onerror=alert(1)>",
    "{{7*7}}",
    "a$b$c",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Two tables: five methods on two backbones, and half of the labels."""
    root = tmp_path_factory.mktemp("site")
    for seed in (0, 1):
        for number, method in enumerate(["scratch", "better", "worse"]):
            for backbone in ("unet", "swinunetr"):
                write_run(root / "runs", method, seed, dice=0.7 + 0.05 * number, backbone=backbone)
            write_run(root / "runs", method, seed, dice=0.5 + 0.1 * number, label_fraction=0.5)
        for name in HOSTILE:
            write_run(root / "runs", name, seed, dice=0.6, environment={"torch": name, name: name})
    (root / "note.txt").write_text("First <b>paragraph</b>.\n\nSecond.\n")
    words = ["leaderboard", "publish", "--runs", root / "runs", "--out", root / "site", "--title", "A & B <i>"]
    assert main([*map(str, words), "--note", str(root / "note.txt")]) == 0
    return root / "site"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page that may say and ask for nothing."""
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def until(page, expression):
    """Wait until it is true; the pages' own policy forbids the browser to evaluate text, which is how others wait."""
    end = time.perf_counter() + 10
    while not page.evaluate(expression):
        assert time.perf_counter() < end, expression
        page.wait_for_timeout(5)


def ready(page, url):
    page.goto(url)
    until(page, "document.getElementById('shown').textContent.includes('rows')")


def column(page, number, table="#t2"):
    return page.eval_on_selector_all(
        f"{table} tbody tr > :nth-child({number})", "cells => cells.map(c => c.textContent)"
    )


def test_sort_by_mouse_and_keyboard(site, page):
    ready(page, (site / "index.html").as_uri())
    heading = page.locator("#t2 thead th").nth(3)
    heading.click()
    until(page, "document.querySelector('#t2 thead th:nth-child(4)').ariaSort === 'ascending'")
    ascending = [float(text.split()[0]) for text in column(page, 4)]
    assert ascending == sorted(ascending)
    heading.get_by_role("button").press("Enter")
    until(page, "document.querySelector('#t2 thead th:nth-child(4)').ariaSort === 'descending'")
    descending = [float(text.split()[0]) for text in column(page, 4)]
    assert descending == sorted(descending, reverse=True)
    assert "sort.t2=3%2Cdesc" in page.url


def test_filter_and_share_the_link(site, page, browser):
    ready(page, (site / "index.html").as_uri())
    page.fill("input[name=search]", "better")
    page.select_option("select[name=backbone]", "swinunetr")
    until(page, "document.getElementById('shown').textContent === '1 rows'")
    assert column(page, 2) == ["better"]
    other = browser.new_page()
    ready(other, page.url)
    assert column(other, 2) == ["better"]
    assert other.input_value("input[name=search]") == "better"
    other.close()
    page.click("text=Show all")
    until(page, "document.getElementById('shown').textContent !== '1 rows'")
    assert "search" not in page.url


def test_open_a_run_and_go_back_to_its_table(site, page):
    ready(page, (site / "index.html").as_uri())
    page.locator("#t2 tbody tr", has_text="better").first.locator("a").first.click()
    assert page.locator("h1").inner_text().startswith("better on")
    assert page.locator("#cases tbody tr").count() == 8
    assert page.locator(".curve polyline").count() == 1
    page.click("text=100% of the labels")
    assert page.locator("table.sortable").count() == 1


def test_dark_and_light_are_chosen_and_remembered(site, page):
    ready(page, (site / "index.html").as_uri())
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    dark = page.evaluate(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(22, 24, 28)")
    page.reload()
    assert page.evaluate(ground) == dark
    page.click("#theme")


@pytest.fixture(scope="module")
def real_site(tmp_path_factory):
    """The published comparison, whose names and numbers are as long as real ones."""
    runs = Path(__file__).parents[2] / "leaderboards" / "published" / "msd_hippocampus_controls" / "runs"
    site = tmp_path_factory.mktemp("real") / "site"
    assert main(["leaderboard", "publish", "--from", str(runs), "--out", str(site), "--filter", "preset=fewshot"]) == 0
    return site


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """The published curves: names with settings press on the other columns."""
    runs = Path(__file__).parents[2] / "leaderboards" / "published" / "msd_hippocampus_budgets" / "runs"
    site = tmp_path_factory.mktemp("long") / "site"
    assert main(["leaderboard", "publish", "--from", str(runs), "--out", str(site), "--filter", "seed=0"]) == 0
    return site


@pytest.mark.parametrize("width", [390, 1280])
def test_no_heading_breaks_inside_a_word(width, long_names, browser):
    page = browser.new_page(viewport={"width": width, "height": 900})
    ready(page, (long_names / "index.html").as_uri())
    lines = """() => [...document.querySelectorAll('.board thead th')].map(each => {
        const range = document.createRange();
        range.selectNodeContents(each.querySelector('.dt-column-title') || each);
        const text = each.innerText.trim();
        const tops = [...range.getClientRects()].map(box => Math.round(box.top));
        return [text, text.split(/[\\s-]+/).length, new Set(tops).size];
    })"""
    headings = page.evaluate(lines)
    assert {"rank", "backbone", "seeds"} <= {text for text, _, _ in headings}
    assert [each for each in headings if each[2] > each[1]] == []


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_pages_fit_the_screen(width, real_site, browser):
    page = browser.new_page(viewport={"width": width, "height": 900})
    run = next(real_site.glob("runs/*voco*/index.html")).relative_to(real_site)
    for path in ("index.html", "tables/1.html", run):
        page.goto((real_site / path).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    ready(page, (real_site / "index.html").as_uri())
    board = "document.querySelector('.board')"
    dice = 1 + page.eval_on_selector_all("#t1 thead th", "all => all.findIndex(c => c.innerText.trim() === 'Dice')")
    box = page.locator(f"#t1 tbody tr td:nth-child({dice})").first.bounding_box()
    assert box["x"] + box["width"] <= width  # what a table is for is on the first screen
    if width == 1280:  # no column of the first screen is cut
        assert page.evaluate(f"{board}.scrollWidth <= {board}.clientWidth")
    page.evaluate(f"{board}.scrollLeft = 10000")
    # The name of a row is in sight, however far its columns are scrolled.
    box = page.locator(".board tbody th").first.bounding_box()
    assert 0 <= box["x"] < box["x"] + box["width"] <= 0.6 * width
    page.close()


def test_a_name_leads_to_a_run_and_leaves_out_what_all_share(real_site, page):
    ready(page, (real_site / "index.html").as_uri())
    assert "pretrain.precision=bf16, pretrain.steps=3000" in page.locator("#t1-text").inner_text()
    assert column(page, 2, "#t1")[1] == "volume_fusion"
    page.locator("#t1 tbody th a", has_text="voco").click()
    assert page.locator("h1").inner_text().startswith("voco")
    page.go_back()
    page.click("text=All columns")
    headings = page.eval_on_selector_all("#t1 thead th", "cells => cells.map(c => c.textContent)")
    assert {"anterior", "posterior", "memory, GiB", "kWh"} < set(headings)


TARGETS = """() => {
  const all = [...document.querySelectorAll('thead [role=button], button, select, input')];
  const boxes = all.map(each => each.getBoundingClientRect());
  const small = boxes.filter(box => box.width < 24 || box.height < 24).length;
  const over = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return [boxes.length, small, boxes.filter((a, n) => boxes.slice(n + 1).some(b => over(a, b))).length];
}"""


@pytest.mark.parametrize("width", [412, 1280])
def test_what_one_clicks_is_large_enough_and_lies_apart(width, real_site, browser):
    """WCAG 2.2, 2.5.8: 24 px across."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    for path in ["index.html", "tables/1.html", next(real_site.glob("runs/*/index.html")).relative_to(real_site)]:
        page.goto((real_site / path).as_uri())
        until(page, "document.querySelector('thead [role=button]') !== null")
        number, small, overlapping = page.evaluate(TARGETS)
        assert number > 2
        assert (small, overlapping) == (0, 0), path
    page.close()


def test_shares_of_the_headroom_are_sorted_as_numbers(real_site, page):
    ready(page, (real_site / "tables" / "1.html").as_uri())
    heading = page.locator("#t1 thead th", has_text="of headroom")
    number = 1 + page.eval_on_selector_all("#t1 thead th", "all => all.findIndex(c => c.innerText === 'of headroom')")
    for descending in (False, True):
        heading.click()
        way = "descending" if descending else "ascending"
        until(page, f"document.querySelector('#t1 thead th:nth-child({number})').ariaSort === '{way}'")
        shares = [int(cell.partition("%")[0]) for cell in column(page, number, "#t1") if cell[0] != "-" or cell[1:]]
        assert len(shares) == 6
        assert shares == sorted(shares, reverse=descending)


CONTRAST = """() => {
  const light = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return ['body', '.board a', '.ci', 'figcaption', 'footer'].map(name => {
    const ink = light(getComputedStyle(document.querySelector(name)).color);
    return [name, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_figures_suit_the_scheme(scheme, real_site, browser):
    page = browser.new_page(color_scheme=scheme)
    ready(page, (real_site / "index.html").as_uri())
    ratios = dict(page.evaluate(CONTRAST))
    assert min(ratios.values()) >= 4.5, ratios  # WCAG 2.2, 1.4.3
    inverted = page.evaluate("getComputedStyle(document.querySelector('.plots img')).filter !== 'none'")
    assert inverted == (scheme == "dark")
    page.close()


def test_everything_has_a_name_for_a_screen_reader(site, page):
    for path in ["index.html", "tables/1.html", next(site.glob("runs/*/index.html")).relative_to(site)]:
        page.goto((site / path).as_uri())
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.evaluate("[...document.images].every(image => image.alt)")
        assert page.evaluate("[...document.querySelectorAll('thead th')].every(th => th.scope === 'col')")
        assert page.evaluate(
            "[...document.querySelectorAll('input, select')].every(field => field.labels.length === 1)"
        )
        assert page.evaluate("document.querySelectorAll('h1').length") == 1
        assert page.evaluate("document.querySelectorAll('main').length") == 1
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


def test_nothing_from_a_record_is_executed(site, page):
    """The page fixture fails on any dialog, error or request."""
    for path in [*site.glob("tables/*.html"), *site.glob("runs/*/index.html")]:
        page.goto(path.as_uri())
    page.goto((site / "index.html").as_uri())
    assert page.evaluate("document.querySelectorAll('table script, table img').length") == 0
    text = page.inner_text("main")
    assert all(name in text for name in HOSTILE)
    assert "49" not in page.title()


def test_every_script_and_link_of_the_pages_is_ours_and_is_there(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert set(re.findall(r"<script[^>]*>", text)) <= {
            f'<script src="{root}static/{name}" defer>'
            for root in ("", "../", "../../")
            for name in ("dataTables-3.1.5.min.js", "site.js")
        }
        for link in re.findall(r"""(?:href|src)="([^"#]*)""", text):
            assert link.startswith("data:") or (path.parent / link).exists(), (path, link)
        assert "http://" not in text
        assert "https://" not in text


def test_hundreds_of_rows_are_paged_and_searched(page, tmp_path):
    for number in range(300):
        write_run(tmp_path / "runs", f"method{number}", dice=0.5 + number / 4000, cases=2)
    runs, _ = records.load_runs([tmp_path / "runs"])
    website.publish(runs, tmp_path / "site", title="many")
    ready(page, (tmp_path / "site" / "index.html").as_uri())
    assert len(column(page, 2, "#t1")) == 100
    page.fill("input[name=search]", "method277")
    until(page, "document.getElementById('shown').textContent === '1 rows'")


def test_the_sites_runs_are_a_folder_of_runs_again(site, tmp_path):
    runs, problems = records.load_runs([site / "runs"])
    assert len(runs) == 2 * (9 + len(HOSTILE))
    assert problems == []
    assert (
        main(["leaderboard", "validate", str(site / "runs"), str(site / "leaderboard.csv"), "--runs", str(tmp_path)])
        == 0
    )


def test_no_name_leads_out_of_the_folder(site):
    assert not (site.parent / "x").exists()
    assert {path.name for path in site.iterdir()} == {
        *("figures", "index.html", "leaderboard.csv", "leaderboard.md", "leaderboard.tex", "runs", "static", "tables"),
        website.MARK,
    }


def test_publish_replaces_a_site_and_nothing_else(tmp_path, capsys):
    write_run(tmp_path / "runs")
    out = tmp_path / "out"
    words = ["leaderboard", "publish", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main(words) == 0
    (out / "stale.txt").write_text("")
    assert main(words) == 0
    assert not (out / "stale.txt").exists()
    (out / website.MARK).unlink()
    assert main(words) == 2
    assert "holds something that is no site" in capsys.readouterr().err
    assert (out / "index.html").exists()


def test_pictures_of_scans_stay_out_when_asked(tmp_path):
    folder = write_run(tmp_path / "runs")
    (folder / "figures").mkdir()
    (folder / "figures" / "segmentation.png").write_bytes(b"png")
    runs, _ = records.load_runs([tmp_path / "runs"])
    website.publish(runs, tmp_path / "with", title="t")
    website.publish(runs, tmp_path / "without", title="t", pictures=False)
    assert len(list((tmp_path / "with").rglob("segmentation.png"))) == 1
    assert not list((tmp_path / "without").rglob("segmentation.png"))
    assert "segmentation.png" not in next((tmp_path / "without").glob("runs/*/index.html")).read_text()


def test_publishing_says_that_pictures_of_scans_are_in_it(tmp_path, capsys):
    folder = write_run(tmp_path / "runs")
    words = ["leaderboard", "publish", "--runs", tmp_path / "runs", "--out", tmp_path / "site"]
    assert "pictures" not in called(capsys, *words)
    (folder / "figures").mkdir()
    assert "it has pictures of real scans (licence: CC0); --without-scans leaves them out" in called(capsys, *words)
    assert "pictures" not in called(capsys, *words, "--without-scans")


def test_links_in_a_run_are_not_followed(tmp_path):
    folder = write_run(tmp_path / "runs")
    (folder / "figures").mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "figures" / "x.png").symlink_to(tmp_path / "secret")
    (folder / "figures" / "dangling.png").symlink_to(tmp_path / "nothing")
    (folder / "figures" / "folder.png").mkdir()
    other = write_run(tmp_path / "runs", "mae")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "scan.png").write_text("secret")
    (other / "figures").symlink_to(tmp_path / "private")
    runs, _ = records.load_runs([tmp_path / "runs"])
    website.publish(runs, tmp_path / "site", title="t")
    assert not list((tmp_path / "site" / "runs").rglob("*.png"))


def test_a_deep_configuration_is_shown_to_a_depth(tmp_path):
    deep: dict = {}
    for _ in range(300):
        deep = {"x": deep}
    write_run(tmp_path / "runs", memory=deep)
    runs, problems = records.load_runs([tmp_path / "runs"])
    assert problems == []
    website.publish(runs, tmp_path / "site", title="t")


@pytest.mark.parametrize("note", [b"\xff\xfe", None])
def test_a_note_that_is_no_text_is_named(tmp_path, capsys, note):
    write_run(tmp_path / "runs")
    if note:
        (tmp_path / "note").write_bytes(note)
    words = [
        "leaderboard",
        "publish",
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "s",
        "--note",
        tmp_path / "note",
    ]
    assert main(list(map(str, words))) == 2
    assert "cannot be read as text" in capsys.readouterr().err


def test_phantoms_are_marked_on_every_page(tmp_path):
    write_run(tmp_path / "runs", data={"source": "phantom"})
    runs, _ = records.load_runs([tmp_path / "runs"])
    website.publish(runs, tmp_path / "site", title="t")
    for path in (tmp_path / "site").rglob("*.html"):
        assert "phantom" in path.read_text().lower()
