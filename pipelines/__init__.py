"""From bytes on disk to a batch on the device. Knows nothing of models; `deitfast` imports it, never the reverse."""
