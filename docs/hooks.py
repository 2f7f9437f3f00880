"""mkdocs: what lies outside docs/ is in the repository, not on the site; of a link there only the text stays."""

import re


def on_page_markdown(markdown: str, **kwargs) -> str:
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
