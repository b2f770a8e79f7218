"""Settings of Sphinx: ``python -m sphinx -W --keep-going docs docs/_build`` builds the pages."""

from __future__ import annotations

import lightning_backdoor

project = "lightning_backdoor"
author = "the contributors of lightning_backdoor"
copyright = author
version = release = lightning_backdoor.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning_backdoor {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args sections state type, shape and unit; signatures keep the defaults
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # hooks of Lightning are documented there
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True  # a reference that leads nowhere is a warning, and a warning is an error
nitpick_ignore_regex = [
    # other packages: there is no inventory of theirs without a network
    (r"py:.*", r"(torch|torchmetrics|pytorch_lightning|collections|pickle)\..*"),
    # names in annotations of attributes
    (r"py:class|py:data", r"Tensor|Trainer|LightningModule|DatasetScanner|LoaderFilter|Case|Measured|Signaled"),
]
