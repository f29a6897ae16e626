"""How Sphinx builds the documentation: `make docs`. Nothing is fetched from anywhere."""

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

project = "MCP Server"
author = "The MCP Control Panel authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "MCP Server"
html_show_copyright = False
html_show_sphinx = False

# Headings can be linked to, as on GitHub.
myst_heading_anchors = 3
# Sphinx has no name for the text of a state diagram; it is shown as it is.
lexers["mermaid"] = TextLexer()

autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Types in signatures belong to packages whose documentation is not here.
nitpick_ignore_regex = [("py:.*", ".*")]
