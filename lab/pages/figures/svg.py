"""A drawing of boxes, arrows and text, written as an SVG for a light and for a dark page.

All figures are 360 units wide, the width of a phone, with text of 11 units or more. GitHub shows them 480
pixels wide where there is room. Colours are named by their role, and each theme gives the roles its colours.
"""

import math
from xml.sax.saxutils import escape, quoteattr

WIDTH, SHOWN_WIDTH = 360, 480
SANS = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
MONO = "ui-monospace,Menlo,Consolas,monospace"

# Text has a contrast of 4.5 with the fills that it stands on, and lines one of 3 with the page (WCAG 2.1 AA);
# a test computes both. The names ending in -fill are backgrounds, the others are for text and lines.
THEMES = {
    "light": {
        "page": "#ffffff",
        "ink": "#1f2328",
        "muted": "#59636e",
        "edge": "#7d8590",
        "box-fill": "#f3f5f8",
        "faint-fill": "#e4e8ed",
        "changed": "#9a6700",
        "changed-fill": "#fff3c4",
        "blue": "#0a58b8",
        "blue-fill": "#dbecff",
        "orange": "#a03f00",
        "orange-fill": "#ffe6d2",
        "green": "#136c2e",
        "green-fill": "#d6f5de",
        "purple": "#6b3fb8",
        "purple-fill": "#ece2ff",
    },
    "dark": {
        "page": "#0d1117",
        "ink": "#e6edf3",
        "muted": "#a5adb8",
        "edge": "#6f7883",
        "box-fill": "#1a2029",
        "faint-fill": "#2b323c",
        "changed": "#e3b341",
        "changed-fill": "#3f3000",
        "blue": "#79b8ff",
        "blue-fill": "#10305a",
        "orange": "#ffa868",
        "orange-fill": "#4a2508",
        "green": "#6fdd8b",
        "green-fill": "#123d20",
        "purple": "#cdb0ff",
        "purple-fill": "#382361",
    },
}

# These are written once for all elements that share them, which makes the files a third as large.
STYLES = ("fill", "stroke", "stroke-width", "stroke-dasharray", "font-size", "font-family", "font-weight")
STYLES += ("text-anchor",)


class Drawing:
    """What to draw, in order. Coordinates are in units, with y downwards; set `height` before rendering.

    `title` names the figure; `description` says what it shows, for readers who do not see it.
    """

    def __init__(self, title: str, description: str):
        self.title, self.description = title, description
        self.height = 0.0
        self.elements: list[tuple[str, dict, str | None]] = []

    def add(self, tag: str, content: str | None = None, **attributes) -> None:
        """An SVG element. A colour is a role in THEMES; an underscore in a name becomes a hyphen."""
        self.elements.append((tag, attributes, content))

    def move_back(self, start: int, end: int) -> None:
        """Moves the elements from number `end` on behind those from number `start` on."""
        self.elements[start:] = self.elements[end:] + self.elements[start:end]

    def box(
        self, x, y, width, height, fill="box-fill", stroke="edge", line=1.0, dashed=False, radius=4, **more
    ) -> None:
        """A rectangle with round corners, whose left upper corner is (x, y)."""
        dash = {"stroke_dasharray": "4 3"} if dashed else {}
        edge = {"stroke": stroke, "stroke_width": line} if stroke else {}
        shape = {"x": x, "y": y, "width": width, "height": height, "rx": radius or None}
        self.add("rect", **shape, fill=fill or "none", **edge, **dash, **more)

    def text(self, x, y, content, size=12, color="ink", anchor="start", mono=False, bold=False) -> None:
        """One line of text whose middle is at height y. anchor: start, middle or end, where x is."""
        anchors = {"text_anchor": anchor} if anchor != "start" else {}
        style = {"font_family": MONO} if mono else {}
        style |= {"font_weight": 600} if bold else {}
        self.add("text", content, x=x, y=y + 0.35 * size, font_size=size, fill=color, **anchors, **style)

    def line(self, *points, color="edge", width=1.5, dashed=False, arrow=False) -> None:
        """A line through points (x, y), with a head at the last one if it is an arrow."""
        drawn, fill = path(points), "none"
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = math.hypot(x - x0, y - y0)
            dx, dy = (x - x0) / length, (y - y0) / length
            x, y = x - width * dx, y - width * dy  # the head's own outline reaches further
            back_x, back_y = x - 4 * dx, y - 4 * dy
            side_x, side_y = -2 * dy, 2 * dx
            corners = [(x, y), (back_x + side_x, back_y + side_y), (back_x - side_x, back_y - side_y)]
            if len(points) == 2 and not dashed:  # a straight line has no inside to fill
                drawn, fill = path((points[0], (back_x, back_y))) + path(corners) + "Z", color
            else:
                drawn = path((*points[:-1], (back_x, back_y)))
                self.add("path", d=path(corners) + "Z", fill=color, stroke=color, stroke_width=width)
        dash = {"stroke_dasharray": "4 3"} if dashed else {}
        self.add("path", d=drawn, fill=fill, stroke=color, stroke_width=width, **dash)

    def circle(self, x, y, radius, fill="box-fill", stroke="edge", line=1.0) -> None:
        edge = {"stroke": stroke, "stroke_width": line} if stroke else {}
        self.add("circle", cx=x, cy=y, r=radius, fill=fill, **edge)

    def render(self, theme: str) -> str:
        """The SVG file for a theme."""
        colors = THEMES[theme]
        height = number(self.height)
        shown_height = number(self.height * SHOWN_WIDTH / WIDTH)
        classes: dict[str, str] = {}  # by what they set
        drawn = []
        for tag, attributes, content in self.elements:
            given = {name.replace("_", "-"): value for name, value in attributes.items() if value is not None}
            style = ";".join(f"{name}:{in_css(name, given, colors)}" for name in STYLES if name in given)
            names = f'class="{classes.setdefault(style, f"s{len(classes)}")}"'
            places = (f"{name}={quoteattr(number(v))}" for name, v in given.items() if name not in STYLES)
            end = "/>" if content is None else f">{escape(content)}</{tag}>"
            drawn.append(f"<{tag} {' '.join([names, *places])}{end}")
        rules = "".join(f".{name}{{{style}}}" for style, name in classes.items())
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{SHOWN_WIDTH}" '
            f'height="{shown_height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="desc">{escape(self.description)}</desc>',
            f"<style>text{{font-family:{SANS}}}{rules}</style>",
            # A page that ignores the theme still gets readable text: the figure has its own background.
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="{colors["page"]}"/>',
        ]
        return "\n".join([*lines, *drawn, "</svg>\n"])


def in_css(name: str, attributes: dict, colors: dict[str, str]) -> str:
    """The value of a style, with roles replaced by the theme's colours."""
    value = attributes[name]
    return f"{number(value)}px" if name == "font-size" else colors.get(value, number(value))


def path(points) -> str:
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def number(value) -> str:
    """A coordinate with at most one decimal; text as it is."""
    return value if isinstance(value, str) else f"{round(float(value), 1):g}"


def decimal(value, digits=2) -> str:
    """A number as the figures write it: a real minus sign, and no minus before a zero."""
    written = f"{float(value):.{digits}f}"
    if not float(written):
        written = written.removeprefix("-")
    return written.replace("-", "−")
