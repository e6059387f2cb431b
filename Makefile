# SPDX-License-Identifier: Apache-2.0
# Every target but clean makes the environment ready first (scripts/bootstrap.sh; .venv unless VENV is set).
# Wheels carry every architecture, whatever the editable install was built for.
WHEEL_CUDA_ARCHS ?= AUTO
.PHONY: demo test bench lint wheel asan clean

demo:
	@py=$$(scripts/bootstrap.sh demo) && "$$py" -m flashmetric train $(ARGS)

test:
	@py=$$(scripts/bootstrap.sh test cuda-checks) && "$$py" -m pytest -q $(ARGS)

bench:
	@py=$$(scripts/bootstrap.sh test) && "$$py" -m bench $(ARGS)

lint:
	@py=$$(scripts/bootstrap.sh lint) && PATH="$$(dirname "$$py"):$$PATH" && \
	ruff check && ruff format --check && \
	clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') && \
	mypy

wheel:
	@py=$$(scripts/bootstrap.sh wheel) && PATH="$$(dirname "$$py"):$$PATH" && \
	rm -rf dist && FLASHMETRIC_CUDA_ARCHS=$(WHEEL_CUDA_ARCHS) python -m build --no-isolation -o dist/raw && \
	auditwheel repair --exclude 'libtorch*.so*' --exclude 'libc10*.so*' -w dist dist/raw/*.whl && \
	mv dist/raw/*.tar.gz dist && rm -r dist/raw

asan:
	@py=$$(scripts/bootstrap.sh test) && scripts/asan.sh "$$py" $(ARGS)

clean:
	rm -rf build dist .venv
