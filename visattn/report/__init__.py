"""The report of a scored folder: one HTML file that needs no network, made from the folder alone.

`write_report` reads `summary.json`, `cases.csv`, `metrics.csv`, `config.yaml`, `folds.json`, `overlays/` and
`curves.png`, each of them optional, and imports no model. Whatever comes from files (case names, class names, the
recipe) is escaped by the template engine, and a content policy in the page forbids scripts and outside addresses even
if something slipped through. `page_environment` and `picture_uri` are for other pages of the same look.
"""

from visattn.curves import write_curves
from visattn.report.content import SPLITS, write_report
from visattn.report.page import page_environment, picture_uri

__all__ = ["SPLITS", "page_environment", "picture_uri", "write_curves", "write_report"]
