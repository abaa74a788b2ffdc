"""The thin side: what talks to Ray, drivers, engines and disks. Decides nothing."""
