# Short names for what CONTRIBUTING.md explains.
.PHONY: help docs preview export test package
PORT ?= 8000

help:            ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

docs:            ## the site, in _docs
	python tools/docs.py

preview: docs    ## the site, at http://localhost:8000
	python -m http.server --directory _docs $(PORT)

export:          ## notebooks -> t2v_turbo/*.py and README.md, cleaned
	nbdev_export && nbdev_clean && python tools/readme.py

test:            ## every notebook, every test; `pytest` alone leaves out the slow ones
	pytest --full

package:         ## wheel and sdist, checked
	rm -rf dist && python -m build && twine check --strict dist/*
