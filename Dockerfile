# Image of the jobs for Kubernetes and Apptainer: docker build -t entkd:0.1.0 .
# requirements.lock pins the CPU build of torch; for GPUs replace that line as README.md describes.
FROM python:3.11-slim
WORKDIR /opt/entkd
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY entkd entkd
RUN pip install --no-cache-dir --no-deps .
