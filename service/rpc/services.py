"""The names of our services in the contract, also used as their health names."""

BATCH_SERVICE = "vllm_batch.v1.BatchService"
WEBHOOK_SERVICE = "vllm_batch.v1.WebhookService"
RECOVERY_SERVICE = "vllm_batch.v1.RecoveryService"
HOST_SERVICE = "vllm_batch.v1.HostService"
