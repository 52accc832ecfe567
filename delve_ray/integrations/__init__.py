"""Where delve_ray meets other libraries; each import is made when it is needed."""
