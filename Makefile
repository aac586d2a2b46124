.PHONY: build
build:  ## the extension, in place, in the environment that is active
	python setup.py build_ext --inplace
