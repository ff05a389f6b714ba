"""HTML that is escaped unless it is `Html` already, so that a class called <b> cannot become one."""

from html import escape

VOID = ("img", "link", "meta")
"""Elements without an end."""


class Html(str):
    """Text that is markup and may stand in a page as it is."""

    __slots__ = ()


def tag(element: str, *inner: str, **attributes: str | None) -> Html:
    """Return an element; `inner` is escaped where it is not Html, and so is every attribute.

    Args:
        element: its name; "" gives the inner parts alone.
        inner: what stands in it.
        attributes: class_ is written class, aria_label aria-label; None leaves one out.
    """
    content = "".join(part if isinstance(part, Html) else escape(part) for part in inner)
    if not element:
        return Html(content)
    given = "".join(map(_attribute, attributes.items()))
    return Html(f"<{element}{given}>" if element in VOID else f"<{element}{given}>{content}</{element}>")


def table(head: list[str], rows: list[list[str]], classes: list[str | None], *, caption: str = "") -> Html:
    """Return a table in a frame of its own, which scrolls where the page is too narrow.

    Args:
        head: of the columns; none for a table of names and values.
        rows: their first cells are headings.
        classes: CSS class of each column.
        caption: over the table.
    """

    def line(cells: list[str], first: str, others: str) -> Html:
        names = [first, *[others] * (len(cells) - 1)]
        return tag("tr", *(tag(n, cell, class_=c) for n, cell, c in zip(names, cells, classes, strict=True)))

    body = [
        tag("caption", caption) if caption else Html(),
        tag("thead", line(head, "th", "th")) if head else Html(),
        tag("tbody", *(line(row, "th", "td") for row in rows)),
    ]
    return tag("div", tag("table", *body), class_="scroll")


def _attribute(pair: tuple[str, str | None]) -> str:
    name, value = pair[0].rstrip("_").replace("_", "-"), pair[1]
    return "" if value is None else f' {name}="{escape(value)}"'
