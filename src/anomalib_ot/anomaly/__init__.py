"""Anomalies as transport to prototypes of normal parts: nn.Modules and their fit; no framework names."""
