# Image of the jobs for Kubernetes and Apptainer: docker build -t entkd:0.1.0 .
# PyPI's torch is the CUDA build; its CUDA libraries are no part of requirements.lock, so the second step adds them.
FROM python:3.11-slim
WORKDIR /opt/entkd
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements.lock
RUN python -c 'import torch' 2> /dev/null || pip install --no-cache-dir --constraint requirements.lock torch
COPY pyproject.toml README.md LICENSE ./
COPY entkd entkd
RUN pip install --no-cache-dir --no-deps .
