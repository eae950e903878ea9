defmodule Bombus.Device do
  @moduledoc false
  # What computes: the options :device and :backend.

  require Logger

  @type t :: :auto | :gpu | :cpu | {:mlx, :cpu}

  @expected ":auto, :gpu, :cpu or {:mlx, :cpu}"

  @doc "The options' table, of those that take a device."
  def schema do
    [
      device: [
        type: {:custom, {__MODULE__, :check}},
        type_spec: quote(do: :auto | :gpu | :cpu | {:mlx, :cpu}),
        by_default: "`:auto`",
        doc: """
        what the model runs on:
          * `:auto` - the GPU where MLX finds one, else the CPU
          * `:gpu` - MLX on Metal or CUDA, or `{:error, %Bombus.Error{reason: :no_gpu}}`. Of several
            NVIDIA cards it is the first that `CUDA_VISIBLE_DEVICES` names when the VM starts
          * `:cpu` - Bombus's own kernels for CPUs, on the mapped file. Activations are float32; where
            they meet quantized weights they are written in 16 bits a number (24 in a float32
            checkpoint) with a scale for every group, more exact than bfloat16; keys and values are
            kept in float16 (float32 in a float32 checkpoint)
          * `{:mlx, :cpu}` - MLX's CPU device, for comparison, where MLX is built in
        """
      ],
      backend: [
        type: {:custom, {__MODULE__, :check_backend}},
        type_spec: quote(do: module() | {module(), keyword()}),
        doc: """
        as in Bumblebee: `{module, device: device}`. Bombus computes itself, so only the device counts
        (or EXLA's `client: :host` and `client: :cuda`). A backend of Nx alone, such as `EXLA.Backend`,
        names no device: the model runs on `device: :auto`, and a warning in the log says so
        """
      ]
    ]
  end

  @doc "The device that checked options name, as the NIF takes it."
  @spec native(keyword(), t()) :: :auto | :gpu | :cpu | :mlx_cpu
  def native(options, default \\ :auto) do
    case options[:device] || options[:backend] || default do
      {:mlx, :cpu} -> :mlx_cpu
      device -> device
    end
  end

  @doc false
  def check(device) when device in [:auto, :gpu, :cpu, {:mlx, :cpu}], do: {:ok, device}

  def check(device) do
    case hint(device) do
      nil -> {:error, @expected}
      hint -> {:error, @expected, hint}
    end
  end

  @gpu "device: :gpu is MLX on Metal or on an NVIDIA card, whichever there is"
  @one "device: :gpu takes the first card; CUDA_VISIBLE_DEVICES=1 before the VM starts makes it another"

  defp hint(name) when name in [:cuda, :metal, :mps, :nvidia, :apple, :mlx], do: @gpu
  defp hint({:mlx, :gpu}), do: @gpu
  defp hint({:mlx, _other}), do: nil
  defp hint({name, number}) when is_atom(name) and is_integer(number), do: @one
  defp hint(name) when name in [:host, :native, :binary], do: "the CPU is device: :cpu"
  defp hint(name) when name in [:rocm, :vulkan, :tpu], do: "there is no backend for it"

  defp hint(name) when is_binary(name) do
    case String.downcase(name) do
      name when name in ["auto", "gpu", "cpu"] -> "an atom, device: :#{name}"
      name -> if name =~ ~r/^(cuda|gpu|metal|mps)/, do: named(name)
    end
  end

  defp hint(_other), do: nil

  defp named(name), do: if(name =~ ~r/:\d+$/, do: @one, else: @gpu)

  @own "Bombus computes itself: write device: :gpu or :cpu"

  @doc false
  # -> the device of a backend
  def check_backend({module, options}) when is_atom(module) and is_list(options) do
    with true <- backend?(module) and Keyword.keyword?(options),
         [] <- Keyword.keys(options) -- [:device, :client, :device_id, :preallocate] do
      of_options(module, options)
    else
      _other -> {:error, "{module, device: device}", "of a backend only its device is read"}
    end
  end

  def check_backend(module) when is_atom(module) do
    cond do
      known?(module) ->
        warn(module)
        {:ok, :auto}

      backend?(module) ->
        {:error, "a backend of Nx, or {module, device: device}",
         "Bombus computes itself, and knows no backend of this name: write device: :gpu or :cpu"}

      true ->
        {:error, "{module, device: device}", @own}
    end
  end

  def check_backend(_other), do: {:error, "{module, device: device}", @own}

  defp of_options(module, options) do
    case {options[:device], options[:client]} do
      {nil, nil} ->
        check_backend(module)

      {nil, :host} ->
        {:ok, :cpu}

      {nil, :cuda} ->
        {:ok, :gpu}

      {nil, other} ->
        {:error, "{module, device: device}", "there is no client #{inspect(other)} here"}

      {device, _client} ->
        of_device(device)
    end
  end

  defp of_device(device) do
    case check(device) do
      {:ok, device} -> {:ok, device}
      {:error, expected} -> {:error, "a backend whose :device is #{expected}"}
      {:error, expected, hint} -> {:error, "a backend whose :device is #{expected}", hint}
    end
  end

  @backends [EXLA.Backend, EMLX.Backend, Torchx.Backend, Nx.BinaryBackend]

  # Those that Bumblebee's users have; others are asked where they are loaded.
  defp known?(module) do
    module in @backends or
      (backend?(module) and Code.ensure_loaded?(module) and
         Nx.Backend in Keyword.get(module.module_info(:attributes), :behaviour, []))
  end

  # EXLA.Backend, EMLX.Backend; not :cuda or true.
  defp backend?(module), do: match?("Elixir." <> _name, Atom.to_string(module))

  defp warn(module) do
    Logger.warning(
      "backend: #{inspect(module)} names no device, and Bombus computes itself: " <>
        "the model runs on device: :auto"
    )
  end
end
