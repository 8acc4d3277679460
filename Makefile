# The commands a developer types; each calls a script, which works without make.
.PHONY: setup check test test-slow docs

setup: # .venv with what the programs and the core tests need
	more=requirements-test.txt && . script/make_venv.sh

check: # ruff and mypy
	sh script/check.sh

test: # the checks and the core tests
	sh script/test.sh

test-slow: # whole programs, kills, several processes
	sh script/test.sh -m slow

docs: # commands, options, links and file names in the documents
	sh script/test.sh tests/docs
