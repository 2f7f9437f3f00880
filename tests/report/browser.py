"""A page in headless Chromium: what it draws, what it says on its console, what it asks the network for.

    python tests/report/browser.py runs/mine/report.html screenshots/

writes a picture for light and dark, wide and narrow, and fails if a figure is not drawn, an error is on the console or
anything was asked for.
"""

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEWS = {
    f"{theme}-{width}": (theme, size)
    for theme in ("light", "dark")
    for width, size in (("wide", (1280, 4200)), ("narrow", (500, 7600)))
}
BEFORE = """<script>
window.said = [];
addEventListener("error", event => said.push(String(event.message)));
addEventListener("unhandledrejection", event => said.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => said.push(words.join(" "));
</script>"""
AFTER = """<script>
addEventListener("load", () => setTimeout(() => {
  const drawn = ".scatterlayer .trace, .barlayer .point, .heatmaplayer image";
  const plots = [...document.querySelectorAll(".plot")].map(plot => {
    const text = plot.querySelector(".xtick text"), box = plot.querySelector(".main-svg");
    return {
      title: plot.getAttribute("aria-label"), marks: plot.querySelectorAll(drawn).length,
      right: box ? box.getBoundingClientRect().right : -1,
      ink: text ? getComputedStyle(text).fill : null,
    };
  });
  const probe = document.createElement("pre");
  probe.id = "probe";
  probe.textContent = JSON.stringify({
    plots, said, requests: performance.getEntriesByType("resource").map(entry => entry.name),
    paper: getComputedStyle(document.body).backgroundColor, width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
  });
  document.body.append(probe);
}, 1000));
</script>"""


def browser() -> str | None:
    """The command of a Chromium on this machine."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def chromium(page: Path, theme: str, size: tuple[int, int], *flags: str) -> str:
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000",
        f"--blink-settings=preferredColorScheme={1 - ('light', 'dark').index(theme)}",
        f"--window-size={size[0]},{size[1]}", *flags, page.resolve().as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def look(page: Path, theme: str, size: tuple[int, int], folder: Path) -> dict:
    """What AFTER finds in a page, its copy for that in `folder`."""
    copy = folder / f"probed-{page.name}"
    text = page.read_text().replace("<head>", f"<head>{BEFORE}", 1)
    head, _, tail = text.rpartition("</body>")
    copy.write_text(f"{head}{AFTER}</body>{tail}")
    found = re.search(r'<pre id="probe">(.*?)</pre>', chromium(copy, theme, size, "--dump-dom"), re.DOTALL)
    copy.unlink()
    return json.loads(unescape(found[1]))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours like rgb(1, 2, 3)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def faults(found: dict) -> list[str]:
    """What is wrong with a page, in words."""
    wrong = [f"console: {line}" for line in found["said"]] + [f"asked for {name}" for name in found["requests"]]
    wrong += [f"{found['overflow']} pixels too wide"] if found["overflow"] > 0 else []
    for plot in found["plots"]:
        if not plot["marks"]:
            wrong.append(f"{plot['title']}: nothing drawn")
        elif plot["right"] > found["width"]:
            wrong.append(f"{plot['title']}: sticks out")
        elif plot["ink"] and contrast(plot["ink"], found["paper"]) < 4.5:
            wrong.append(f"{plot['title']}: {plot['ink']} on {found['paper']}")
    return wrong if found["plots"] else ["no figures"]


def main(page: Path, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    for name, (theme, size) in VIEWS.items():
        picture = folder / f"{page.parent.name}-{name}.png"
        chromium(page, theme, size, f"--screenshot={picture.resolve()}")
        found = look(page, theme, size, folder)
        print(f"{picture}: {len(found['plots'])} figures, {'; '.join(faults(found)) or 'no faults'}")
        status |= bool(faults(found))
    return status


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
